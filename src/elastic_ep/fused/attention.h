// Grouped-query attention over a paged cache, one token at a time: what a token gets is a function of its query and of
// the keys and values up to its own position, whether they were computed in this step or long before.
#pragma once

#include "rows.h"

// Of a layer's cache: rows [2 (keys, values), heads, pages, page_size] of `dim` floats.
struct Cache {
    float* rows;
    int64_t heads, pages, page_size, dim;

    float* keys(int64_t head, int64_t page) const { return rows + (head * pages + page) * page_size * dim; }
    float* values(int64_t head, int64_t page) const { return keys(heads + head, page); }
};

constexpr int64_t KEYS = 8;  // that are scored together: divides a page

// Of each of KEYS keys all lanes are added: neighbours, pairs, then the halves.
static inline __m256 totals(const __m256* lanes) {
    __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(lanes[0], lanes[1]), _mm256_hadd_ps(lanes[2], lanes[3]));
    __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(lanes[4], lanes[5]), _mm256_hadd_ps(lanes[6], lanes[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

// Of `seen` keys in `table`'s pages: their dot products with q [dim], times `scale`. What follows in `scores` is anything.
// B: as many times LANES `dim` is; 0: any number.
template <int B>
static void score(const Cache& cache, int64_t head, const int64_t* table, int64_t seen, const float* q, float scale,
                  float* scores) {
    __m256 scales = _mm256_set1_ps(scale);
    V query[B ? B : 1];
    for (int b = 0; b < B; ++b) query[b] = load(q + b * LANES);
    for (int64_t first = 0; first < seen; first += cache.page_size) {
        const float* key = cache.keys(head, table[first / cache.page_size]);
        int64_t count = std::min(cache.page_size, seen - first);
        for (int64_t i = 0; i < count; i += KEYS) {
            __m256 lanes[KEYS];
            for (int k = 0; k < KEYS; ++k, key += cache.dim) {
                V sum = zero();
                if constexpr (B) {
                    for (int b = 0; b < B; ++b) sum = fma(query[b], load(key + b * LANES), sum);
                } else {
                    in_lanes(q, cache.dim, [&](int64_t at, V v, int64_t n) { sum = fma(v, take(key + at, n), sum); });
                }
                lanes[k] = halves_added(sum);
            }
            _mm256_storeu_ps(scores + first + i, _mm256_mul_ps(totals(lanes), scales));
        }
    }
}

template <int C>
static void weigh(const Cache& cache, int64_t head, const int64_t* table, int64_t seen, const float* shares,
                  float share_of_one, int64_t column, float* out) {
    // Two chains of additions, so that one need not wait for the other: keys at even places, and at odd ones.
    V even[C], odd[C];
    for (int c = 0; c < C; ++c) even[c] = odd[c] = zero();
    for (int64_t first = 0; first < seen; first += cache.page_size) {
        const float* values = cache.values(head, table[first / cache.page_size]) + column;
        int64_t count = std::min(cache.page_size, seen - first), i = 0;
        for (; i + 2 <= count; i += 2) {
            V one = all_of(shares[first + i]), next = all_of(shares[first + i + 1]);
            for (int c = 0; c < C; ++c) {
                even[c] = fma(one, load(values + i * cache.dim + c * LANES), even[c]);
                odd[c] = fma(next, load(values + (i + 1) * cache.dim + c * LANES), odd[c]);
            }
        }
        if (i < count)
            for (int c = 0; c < C; ++c)
                even[c] = fma(all_of(shares[first + i]), load(values + i * cache.dim + c * LANES), even[c]);
    }
    for (int c = 0; c < C; ++c) store(out + column + c * LANES, (even[c] + odd[c]) * all_of(share_of_one));
}

// out [dim]: the values' mean, weighted with `shares`, whose sum is 1 / share_of_one.
static void weighted_values(const Cache& cache, int64_t head, const int64_t* table, int64_t seen, const float* shares,
                            float share_of_one, float* out) {
    int64_t column = 0;
    for (; column + 2 * LANES <= cache.dim; column += 2 * LANES)
        weigh<2>(cache, head, table, seen, shares, share_of_one, column, out);
    for (; column + LANES <= cache.dim; column += LANES)
        weigh<1>(cache, head, table, seen, shares, share_of_one, column, out);
    for (; column < cache.dim; ++column) {
        float sum = 0.0f;
        for (int64_t j = 0; j < seen; ++j) {
            const float* values = cache.values(head, table[j / cache.page_size]);
            sum = std::fma(shares[j], values[j % cache.page_size * cache.dim + column], sum);
        }
        out[column] = sum * share_of_one;
    }
}

template <int B>
static inline void attend_heads(const Cache& cache, int64_t heads, const int64_t* table, int64_t seen,
                                const float* queries, float* scores, float* out) {
    float scale = 1.0f / std::sqrt(float(cache.dim));
    int64_t group = heads / cache.heads;
    for (int64_t head = 0; head < heads; ++head) {
        score<B>(cache, head / group, table, seen, queries + head * cache.dim, scale, scores);
        float share_of_one = 1.0f / exponentials(scores, seen);
        weighted_values(cache, head / group, table, seen, scores, share_of_one, out + head * cache.dim);
    }
}

// out [heads of queries, dim] of one token's queries; `seen` keys and values are in the cache. `scores` [seen, up to whole
// KEYS] is scratch.
static void attend(const Cache& cache, int64_t heads, const int64_t* table, int64_t seen, const float* queries,
                   float* scores, float* out) {
    if (cache.dim == 2 * LANES)
        attend_heads<2>(cache, heads, table, seen, queries, scores, out);
    else if (cache.dim == 4 * LANES)
        attend_heads<4>(cache, heads, table, seen, queries, scores, out);
    else if (cache.dim == 8 * LANES)
        attend_heads<8>(cache, heads, table, seen, queries, scores, out);
    else
        attend_heads<0>(cache, heads, table, seen, queries, scores, out);
}
