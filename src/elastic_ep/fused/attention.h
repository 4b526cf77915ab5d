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

static inline float dot(const float* a, const float* b, int64_t n) {
    V sum = zero();
    in_lanes(a, n, [&](int64_t i, V v, int64_t count) { sum = fma(v, take(b + i, count), sum); });
    return sum_of(sum);
}

// Of `seen` keys in `table`'s pages: their dot products with q [dim], times `scale`.
static void score(const Cache& cache, int64_t head, const int64_t* table, int64_t seen, const float* q, float scale,
                  float* scores) {
    for (int64_t first = 0; first < seen; first += cache.page_size) {
        const float* keys = cache.keys(head, table[first / cache.page_size]);
        int64_t count = std::min(cache.page_size, seen - first);
        for (int64_t i = 0; i < count; ++i) scores[first + i] = dot(q, keys + i * cache.dim, cache.dim) * scale;
    }
}

template <int C>
static void weigh(const Cache& cache, int64_t head, const int64_t* table, int64_t seen, const float* shares,
                  float share_of_one, int64_t column, float* out) {
    V sums[C];
    for (int c = 0; c < C; ++c) sums[c] = zero();
    for (int64_t first = 0; first < seen; first += cache.page_size) {
        const float* values = cache.values(head, table[first / cache.page_size]) + column;
        int64_t count = std::min(cache.page_size, seen - first);
        for (int64_t i = 0; i < count; ++i) {
            V share = all_of(shares[first + i]);
            for (int c = 0; c < C; ++c) sums[c] = fma(share, load(values + i * cache.dim + c * LANES), sums[c]);
        }
    }
    for (int c = 0; c < C; ++c) store(out + column + c * LANES, sums[c] * all_of(share_of_one));
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

// out [heads of queries, dim] of one token's queries; `seen` keys and values are in the cache. `scores` [seen] is scratch.
static void attend(const Cache& cache, int64_t heads, const int64_t* table, int64_t seen, const float* queries,
                   float* scores, float* out) {
    float scale = 1.0f / std::sqrt(float(cache.dim));
    int64_t group = heads / cache.heads;
    for (int64_t head = 0; head < heads; ++head) {
        score(cache, head / group, table, seen, queries + head * cache.dim, scale, scores);
        float share_of_one = 1.0f / exponentials(scores, seen);
        weighted_values(cache, head / group, table, seen, scores, share_of_one, out + head * cache.dim);
    }
}
