// Functions of vectors of floats.
// Included once for each instruction set, after its Isa.
#pragma once

// e^x to about 1 ulp between -87.3 and 88.3, and the value at the nearer end outside.
inline Isa::Floats Exp(Isa::Floats x) {
  using F = Isa::Floats;
  const auto splat = [](float v) { return Isa::SplatFloat(v); };
  const F low = splat(-87.33654f);
  // In this order NaN stays NaN.
  x = Isa::MinFloats(splat(88.37f), Isa::MaxFloats(low, x));
  // x = n log 2 + r, |r| <= log(2)/2; log 2 in two parts so that r keeps its digits.
  const Isa::Vec n = Isa::RoundToInt(Isa::MulFloats(x, splat(1.44269504f)));
  const F whole = Isa::IntToFloats(n);
  F r = Isa::MultiplyAdd(whole, splat(-0.693359375f), x);
  r = Isa::MultiplyAdd(whole, splat(2.12194440e-4f), r);
  // e^r = 1 + r + r^2 p(r), p of degree 5 (Cephes expf).
  F p = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                        5.0000001201e-1f}) {
    p = Isa::MultiplyAdd(p, r, splat(c));
  }
  p = Isa::MultiplyAdd(p, Isa::MulFloats(r, r), Isa::AddFloats(r, splat(1)));
  const Isa::Vec bits = Isa::template ShiftLeft32<23>(Isa::Add32(n, Isa::Splat32(127)));
  return Isa::MulFloats(p, Isa::FromBits(bits));
}

// 1 / (1 + e^-x)
inline Isa::Floats Sigmoid(Isa::Floats x) {
  const Isa::Floats one = Isa::SplatFloat(1);
  const Isa::Floats e = Exp(Isa::SubFloats(Isa::SplatFloat(0), x));
  return Isa::DivFloats(one, Isa::AddFloats(one, e));
}
