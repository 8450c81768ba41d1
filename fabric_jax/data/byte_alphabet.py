"""How byte-level vocabularies spell bytes."""


def byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level vocabularies write for each byte.

    Bytes that print in Latin-1 stand for themselves, the others follow from U+0100 in order
    (GPT-2, Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
