// 2^f for f in [-0.5, 0.5] by Horner's rule, its relative error below 2^-23: the Taylor series of exp(f log 2).
template <class Isa>
inline typename Isa::V power_of_two(typename Isa::V f) {
    typename Isa::V p = Isa::set1(1.54035304e-4f);
    for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) {
        p = Isa::fmadd(p, f, Isa::set1(c));
    }
    return p;
}
