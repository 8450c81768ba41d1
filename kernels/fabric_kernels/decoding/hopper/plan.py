"""How a step through all layers is divided among the programs of a Mosaic GPU launch.

A *unit* is 16 rows of a matrix, whole, or equal rows of two; a program has every G-th unit of a
phase. Its *tiles* of 16 rows go to the teams of its warps in turn, through a ring of *slots* in
shared memory for each team: a slot is 16 rows of a *chunk* of at most 12 *blocks*, each 64 bytes
(256 codes) wide, which is what the lanes of a warp read at once.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from fabric_kernels.attention.cache import KVCache
from fabric_kernels.decoding.stacks import MATRICES, LayerStacks

UNIT_ROWS = 16
BLOCK_BYTES = 64
BLOCK_CODES = 256
MOST_BLOCKS = 12
"""Of a chunk."""
TEAMS = 2
"""Of warps: each multiplies every second tile of 16 rows."""
TEAM = 8
"""Warps of a team, which have the blocks of a tile in turn."""
WARPS = TEAMS * TEAM
THREADS = 32 * WARPS
PHASES = ("project", "attend", "close", "widen", "narrow")
COUNTER_WORDS = 32
"""From one counter to the next: they are in cache lines of their own."""
BANKS = 128
"""Bytes after which rows of a slot are in the same banks of shared memory."""
SHARED_BYTES = 226 << 10
"""Of a program, on Hopper 227 KiB at most."""
MOST_SLOTS = 32


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Products of one vector.

    Attributes:
        matrices: by name, one after another; or gate and up, whose equal rows go together.
        rows: of each.
        k: their width in codes.
        paired: whether a unit is one of each matrix.
        offset: the program that has the first unit.
        first_team: the team that has a program's first tile.
    """

    matrices: tuple[str, ...]
    rows: tuple[int, ...]
    k: int
    paired: bool = False
    offset: int = 0
    first_team: int = 0

    @property
    def units(self) -> int:
        """Of all programs; pairs count once."""
        return (self.rows[0] if self.paired else sum(self.rows)) // UNIT_ROWS

    @property
    def each(self) -> int:
        """Tiles of 16 rows of a unit."""
        return len(self.matrices) if self.paired else 1

    @property
    def row_bytes(self) -> int:
        """Packed."""
        return self.k // 4

    @property
    def chunks(self) -> list[int]:
        """Blocks of each chunk of a row."""
        blocks = self.row_bytes // BLOCK_BYTES
        count = -(-blocks // MOST_BLOCKS)
        size = -(-blocks // count)
        return [min(size, blocks - start) for start in range(0, blocks, size)]

    def most_tiles(self, programs: int) -> int:
        """Of a program."""
        return -(-self.units // programs) * self.each


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a launch.

    Attributes:
        rows: B.
        layers: L.
        hidden: D.
        ffn: F.
        heads: H.
        kv_heads: K.
        width: hd.
        slots: S of the cache.
        programs: G.
    """

    rows: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    width: int
    slots: int
    programs: int

    @cached_property
    def phases(self) -> dict[str, Phase]:
        """Those with products, in order. Each begins where the one before it ended.

        Teams begin in turn: of many phases a program has one tile.
        """
        own, shared = self.heads * self.width, self.kv_heads * self.width
        found = {
            "project": Phase(matrices=("q", "k", "v"), rows=(own, shared, shared), k=self.hidden),
            "close": Phase(matrices=("o",), rows=(self.hidden,), k=own),
            "widen": Phase(
                matrices=("gate", "up"), rows=(self.ffn,) * 2, k=self.hidden, paired=True
            ),
            "narrow": Phase(matrices=("down",), rows=(self.hidden,), k=self.ffn),
        }
        ends = accumulate(phase.units for phase in found.values())
        return {
            name: replace(phase, offset=(end - phase.units) % self.programs, first_team=i % TEAMS)
            for i, ((name, phase), end) in enumerate(zip(found.items(), ends, strict=True))
        }

    # ---- shared memory ---------------------------------------------------------------------------

    @property
    def row_stride(self) -> int:
        """Bytes from row to row of a slot: eight lanes that read two rows meet no bank twice."""
        most = max(max(phase.chunks) for phase in self.phases.values()) * BLOCK_BYTES
        return most if most % BANKS == BLOCK_BYTES else most + BLOCK_BYTES

    @property
    def slot_bytes(self) -> int:
        """Of 16 rows of a chunk."""
        return UNIT_ROWS * self.row_stride

    @property
    def streams(self) -> int:
        """Groups of lanes that each attend to slots of their own."""
        return WARPS * (32 // self.lanes)

    @property
    def exchange(self) -> dict[str, tuple[int, int]]:
        """Where in a row of what programs exchange a vector begins, and its length."""
        own, shared = self.heads * self.width, self.kv_heads * self.width
        sizes = {"q": own, "k": shared, "v": shared, "attended": own, "middle": self.ffn}
        places, start = {}, 0
        for name, size in sizes.items():
            places[name] = start, size
            start += size
        return places

    @property
    def exchanged(self) -> int:
        """Words of such a row."""
        return sum(size for _, size in self.exchange.values())

    @property
    def column_tiles(self) -> int:
        """Of the matrix units' eight columns: a token has four."""
        return -(-self.rows // 2)

    def participants(self, name: str) -> int:
        """Programs that have something to do in a phase."""
        if name == "attend":
            return min(self.programs, self.rows * self.heads)
        return min(self.programs, self.phases[name].units)

    @property
    def lanes(self) -> int:
        """That have a vector of a head, eight channels each."""
        return 1 << (self.width // 8 - 1).bit_length()

    @property
    def token_bytes(self) -> int:
        """Codes of a token, as wide as the widest."""
        return max(phase.k for phase in self.phases.values())

    @property
    def work_bytes(self) -> int:
        """Codes of all tokens; or what streams of attention found."""
        return max(self.rows * self.token_bytes, 4 * (WARPS + 4) * (self.width + 2))

    @property
    def tiles(self) -> int:
        """Of a program, at most: their sums."""
        return max(phase.most_tiles(self.programs) for phase in self.phases.values())

    @cached_property
    def places(self) -> dict[str, int]:
        """First bytes in shared memory: of work, sums, statistics, barriers, and the ring."""
        sizes = {
            "work": self.work_bytes,
            # Query, key and value of the new token, turned.
            "new": 3 * 4 * self.width,
            "sums": 4 * UNIT_ROWS * self.tiles * self.rows,
            # Of each token: squares and maxima of warps, and the sum of its codes.
            "squares": 4 * WARPS * self.rows,
            "largest": 4 * WARPS * self.rows,
            "totals": 8 * self.rows,
            "full": 8 * MOST_SLOTS,
            "empty": 8 * MOST_SLOTS,
        }
        places, end = {}, 0
        for name, size in sizes.items():
            places[name] = end
            end += -(-size // 16) * 16
        places["ring"] = -(-end // BANKS) * BANKS
        return places

    @property
    def ring_slots(self) -> int:
        """Of the ring of each team."""
        return min(MOST_SLOTS, (SHARED_BYTES - self.places["ring"]) // self.slot_bytes) // TEAMS

    @property
    def shared_bytes(self) -> int:
        """Of everything."""
        return self.places["ring"] + TEAMS * self.ring_slots * self.slot_bytes


def make_plan(stacks: LayerStacks, cache: KVCache, rows: int, programs: int) -> Plan:
    """The plan of a step."""
    return Plan(
        rows=rows,
        layers=stacks.q.packed.shape[0],
        hidden=stacks.down.n,
        ffn=stacks.gate.n,
        heads=stacks.heads,
        kv_heads=stacks.kv_heads,
        width=cache.keys.shape[-1],
        slots=cache.capacity,
        programs=programs,
    )


def why_not(stacks: LayerStacks, cache: KVCache) -> str | None:
    """What keeps this kernel from taking these shapes; None where it does."""
    for name in MATRICES:
        matrix = getattr(stacks, name)
        if matrix.n % UNIT_ROWS or matrix.k % BLOCK_CODES:
            return f"{name} is {matrix.n} x {matrix.k}, not in blocks of 16 x 256"
    width = cache.keys.shape[-1]
    if width % 16 or width > 256:
        return f"heads are {width} wide, not a multiple of 16 up to 256"
    if cache.key_scales is not None or cache.keys.dtype != "bfloat16":
        return f"the cache is {cache.keys.dtype}, not bfloat16"
    return None
