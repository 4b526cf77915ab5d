// Operations on rows of floats. What a row gets is a function of that row and of the weights alone: each sum runs in an
// order that knows neither how many rows there are nor which is whose neighbour.
#pragma once

#include <algorithm>

#include "vector.h"

#if defined(__AVX512F__)
constexpr int ROWS = 8, STRIP = 2;
#else
constexpr int ROWS = 6, STRIP = 1;
#endif
constexpr int64_t DEPTH = 32;  // rows of a matrix that are gone through for all columns, so that they stay in a cache

// y[R][C * LANES] += x[R][depth] w[depth][C * LANES], or = if `begins`. One chain of additions for each number of y.
template <int R, int C, typename W>
static inline void block(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t depth, float* y,
                         int64_t y_stride, bool begins) {
    V sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = begins ? zero() : load(y + r * y_stride + c * LANES);
    for (int64_t k = 0; k < depth; ++k) {
        V right[C];
        for (int c = 0; c < C; ++c) right[c] = load(w + k * w_stride + c * LANES);
        for (int r = 0; r < R; ++r) {
            V left = all_of(x[r * x_stride + k]);
            for (int c = 0; c < C; ++c) sums[r][c] = fma(left, right[c], sums[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(y + r * y_stride + c * LANES, sums[r][c]);
}

template <int R, typename W>
static void rows_by_depth(const float* x, int64_t x_stride, const W* w, int64_t width, int64_t depth, float* y,
                          bool begins) {
    int64_t column = 0;
    for (; column + STRIP * LANES <= width; column += STRIP * LANES)
        block<R, STRIP>(x, x_stride, w + column, width, depth, y + column, width, begins);
    for (; column + LANES <= width; column += LANES)
        block<R, 1>(x, x_stride, w + column, width, depth, y + column, width, begins);
    for (; column < width; ++column)
        for (int r = 0; r < R; ++r) {
            float sum = begins ? 0.0f : y[r * width + column];
            for (int64_t k = 0; k < depth; ++k) sum = std::fma(x[r * x_stride + k], wide(w[k * width + column]), sum);
            y[r * width + column] = sum;
        }
}

template <int R, typename W>
static void some_rows(int64_t rows, const float* x, int64_t x_stride, const W* w, int64_t width, int64_t depth,
                      float* y, bool begins) {
    if (rows == R)
        rows_by_depth<R>(x, x_stride, w, width, depth, y, begins);
    else if constexpr (R > 1)
        some_rows<R - 1>(rows, x, x_stride, w, width, depth, y, begins);
}

// y [rows, width] = x [rows, inner] w [inner, width]
template <typename W>
static void linear(const float* x, int64_t rows, int64_t inner, const W* w, int64_t width, float* y) {
    for (int64_t k = 0; k < inner; k += DEPTH) {
        int64_t depth = std::min(DEPTH, inner - k);
        for (int64_t row = 0; row < rows; row += ROWS) {
            int64_t count = std::min<int64_t>(ROWS, rows - row);
            some_rows<ROWS>(count, x + row * inner + k, inner, w + k * width, width, depth, y + row * width, k == 0);
        }
    }
}

// y = x / sqrt(mean(x^2) + eps) * weight
static void rms_norm(const float* x, int64_t n, const float* weight, float eps, float* y) {
    V squares = zero();
    in_lanes(x, n, [&](int64_t, V v, int64_t) { squares = fma(v, v, squares); });
    V scale = all_of(1.0f / std::sqrt(sum_of(squares) / float(n) + eps));
    in_lanes(x, n, [&](int64_t i, V v, int64_t count) { put(y + i, v * scale * take(weight + i, count), count); });
}

static void add(float* x, const float* y, int64_t n) {
    in_lanes(y, n, [&](int64_t i, V v, int64_t count) { put(x + i, take(x + i, count) + v, count); });
}

static void clamp(float* x, int64_t n, float limit) {
    V least = all_of(-limit), most = all_of(limit);
    in_lanes(x, n, [&](int64_t i, V v, int64_t count) { put(x + i, at_most(at_least(v, least), most), count); });
}

// In place: pairs are (i, i + n / 2). The sines of the first half have their sign.
static void rotate(float* x, int64_t n, const float* cosines, const float* sines) {
    for (int64_t i = 0, half = n / 2; i < half; ++i) {
        float first = x[i], second = x[i + half];
        x[i] = std::fma(second, sines[i], first * cosines[i]);
        x[i + half] = std::fma(first, sines[i + half], second * cosines[i + half]);
    }
}

static float largest(const float* x, int64_t n) {
    float most = x[0];
    if (n >= LANES) {
        float lanes[LANES];
        V all = load(x);
        for (int64_t i = LANES; i + LANES <= n; i += LANES) all = at_least(all, load(x + i));
        store(lanes, all);
        for (float lane : lanes) most = lane > most ? lane : most;
    }
    for (int64_t i = n / LANES * LANES; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// In place: e^(x - the largest). Returns their sum.
static float exponentials(float* x, int64_t n) {
    V most = all_of(largest(x, n)), sum = zero();
    in_lanes(x, n, [&](int64_t i, V v, int64_t count) {
        V power = exponential(v - most);
        put(x + i, power, count);
        sum = sum + take(x + i, count);  // zeros beyond the last
    });
    return sum_of(sum);
}

// y [n] = silu(x[:n]) * x[n:2n]
static void swiglu(const float* x, int64_t n, float* y) {
    const V one = all_of(1.0f);
    in_lanes(x, n, [&](int64_t i, V v, int64_t count) {
        V gated = v / (one + exponential(zero() - v));
        put(y + i, gated * take(x + n + i, count), count);
    });
}
