// The 16-bit floats as integers, and their conversions: to float32 exact, from float32 to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace onecard {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
    uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    if (rest >= 0x7C00) return from_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
    return from_bits(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
}

inline void convert(float x, float& out) { out = x; }
inline void convert(float x, BFloat16& out) {
    uint32_t bits = bits_of(x);
    out.bits = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void convert(float x, Float16& out) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest >= 0x477FF000) {  // rounds to 65520 or more
        out.bits = static_cast<uint16_t>(sign | 0x7C00);
    } else if (rest >= 0x38800000) {  // normal
        out.bits = static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13);
    } else {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the last bits
        out.bits = static_cast<uint16_t>(sign | (bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f)));
    }
}

}  // namespace onecard
