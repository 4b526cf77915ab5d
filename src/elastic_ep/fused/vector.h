// Sixteen floats at once, on AVX-512 or as two halves on AVX2: the same roundings in the same order on both.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;

// The upper half of a float: bfloat16, in which checkpoints store weights. To widen it rounds nothing.
struct Half {
    uint16_t bits;
};

static inline float wide(float value) { return value; }
static inline float wide(Half value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float all;
    std::memcpy(&all, &bits, sizeof all);
    return all;
}

#if defined(__AVX512F__)

struct V {
    __m512 all;
};

static inline V zero() { return {_mm512_setzero_ps()}; }
static inline V all_of(float value) { return {_mm512_set1_ps(value)}; }
static inline V load(const float* at) { return {_mm512_loadu_ps(at)}; }
static inline V load(const Half* at) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline void store(float* at, V v) { _mm512_storeu_ps(at, v.all); }
static inline V operator+(V a, V b) { return {_mm512_add_ps(a.all, b.all)}; }
static inline V operator-(V a, V b) { return {_mm512_sub_ps(a.all, b.all)}; }
static inline V operator*(V a, V b) { return {_mm512_mul_ps(a.all, b.all)}; }
static inline V operator/(V a, V b) { return {_mm512_div_ps(a.all, b.all)}; }
static inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
// NaN in `v` stays.
static inline V at_least(V v, V least) { return {_mm512_max_ps(least.all, v.all)}; }
static inline V at_most(V v, V most) { return {_mm512_min_ps(most.all, v.all)}; }

// 2 to the power of whole numbers from -126 to 127.
static inline V power_of_two(V whole) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(whole.all), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
}

static inline __m256 halves_added(V v) {
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.all), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(v.all), upper);
}

#else

struct V {
    __m256 low, high;
};

static inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline V all_of(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
static inline V load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
static inline __m256 load_half(const Half* at) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline V load(const Half* at) { return {load_half(at), load_half(at + 8)}; }
static inline void store(float* at, V v) {
    _mm256_storeu_ps(at, v.low);
    _mm256_storeu_ps(at + 8, v.high);
}
static inline V operator+(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
static inline V operator-(V a, V b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
static inline V operator*(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
static inline V operator/(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
static inline V fma(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// NaN in `v` stays.
static inline V at_least(V v, V least) { return {_mm256_max_ps(least.low, v.low), _mm256_max_ps(least.high, v.high)}; }
static inline V at_most(V v, V most) { return {_mm256_min_ps(most.low, v.low), _mm256_min_ps(most.high, v.high)}; }

static inline __m256 power_of_two(__m256 whole) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}

// 2 to the power of whole numbers from -126 to 127.
static inline V power_of_two(V whole) { return {power_of_two(whole.low), power_of_two(whole.high)}; }
static inline __m256 halves_added(V v) { return _mm256_add_ps(v.low, v.high); }

#endif

// Pairs eight apart, then four, two, one.
static inline float sum_of(V v) {
    __m256 eight = halves_added(v);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The first `count` floats, zeros in the other lanes.
static inline V load_part(const float* at, int64_t count) {
    float lanes[LANES] = {};
    std::memcpy(lanes, at, count * sizeof(float));
    return load(lanes);
}

static inline void store_part(float* at, V v, int64_t count) {
    float lanes[LANES];
    store(lanes, v);
    std::memcpy(at, lanes, count * sizeof(float));
}

// Calls `each(first, v, count)` with the lanes of `n` floats at `at`; zeros beyond the last.
template <typename Each>
static inline void in_lanes(const float* at, int64_t n, Each each) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) each(i, load(at + i), int64_t(LANES));
    if (i < n) each(i, load_part(at + i, n - i), n - i);
}

static inline void put(float* at, V v, int64_t count) {
    if (count == LANES)
        store(at, v);
    else
        store_part(at, v, count);
}

// The next `count` floats of something that `in_lanes` walks beside.
static inline V take(const float* at, int64_t count) { return count == LANES ? load(at) : load_part(at, count); }

// e^v, a unit in the last place off at most; what would be no normal number is the smallest or the largest one.
static inline V exponential(V v) {
    const V shift = all_of(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    V x = at_most(at_least(v, all_of(-87.0f)), all_of(88.0f));
    V whole = fma(x, all_of(1.44269504088896f), shift) - shift;
    V rest = fma(whole, all_of(-0.693359375f), x);  // ln 2 in two parts: the first is exact in nine bits
    rest = fma(whole, all_of(2.12194440e-4f), rest);
    V sum = all_of(1.0f / 5040);  // |rest| <= ln 2 / 2: the series' next term is 5e-9
    for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = fma(sum, rest, all_of(term));
    return sum * power_of_two(whole);
}
