// The exchange of pull.py, in the same windows: which words are written and read when, and why that is right, is said there.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>

#include "rows.h"

constexpr int64_t STRIDE = 8;  // words from one rank's first to the next rank's
constexpr long LOOK_AGAIN_NS = 2'000'000;

// Laid out as `ExchangeState` in library.py. Python reads `number`, `operations` and `waits` at any time.
struct Exchange {
    int64_t ranks, max_tokens, hidden, top_k, slots, me, carried;
    volatile int64_t* words;
    int32_t* experts;  // [ranks, max_tokens, top_k]
    float* x;          // [ranks * max_tokens and more, hidden]
    float* boxes;      // [ranks * max_tokens, top_k, hidden]
    const volatile uint8_t* live;
    const volatile uint8_t* reachable;
    uint8_t* missed;  // ranks that do not take part, and were sent to; if any was, `astray` is 1
    int64_t* found;   // [ranks * max_tokens * top_k, 2]: scratch
    int64_t* rows;    // [ranks * max_tokens * top_k]: where what came for this rank's slots lies, slot by slot
    int64_t* firsts;  // [slots + 1]: where in `rows` each slot begins
    int64_t number, operations, waits, tokens, astray;
};

static inline void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

static volatile int64_t* alarms(Exchange& e) { return e.words + e.ranks * STRIDE; }

static void raise_alarm(Exchange& e) {
    *alarms(e) = *alarms(e) + 1;  // nobody needs it exact: see shm.py
    syscall(SYS_futex, alarms(e), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// What is posted is told to other hosts: by the carrier, which sleeps until it hears of it (bell.py). Those wait for
// all ranks of this host, so that the last of these knocks is enough.
static void knock(Exchange& e) {
    for (int64_t rank = 0; rank < e.ranks; ++rank)
        if (rank != e.me && e.words[rank * STRIDE + 3] && e.words[rank * STRIDE] < e.number && e.live[rank]) return;
    volatile int64_t* knocks = alarms(e) + 1;
    *knocks = *knocks + 1;
    syscall(SYS_futex, knocks, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

static bool somebody_is_missing(Exchange& e) {
    for (int64_t rank = 0; rank < e.ranks; ++rank)
        if (rank != e.me && e.words[rank * STRIDE] < e.number && e.live[rank]) return true;
    return false;
}

// Posts this rank's data of the next operation, and returns when those of all live peers are there.
static void meet(Exchange& e) {
    e.number += 1;
    fence();
    e.words[e.me * STRIDE] = e.number;
    fence();
    if (e.carried) knock(e);
    if (!somebody_is_missing(e)) {
        raise_alarm(e);
    } else {
        e.waits = 1;
        sched_yield();
        // The count is read before the words and the masks: what changes after that ends the sleep.
        uint32_t count = uint32_t(*alarms(e));
        fence();
        while (somebody_is_missing(e)) {
            timespec longest = {0, LOOK_AGAIN_NS};
            syscall(SYS_futex, alarms(e), FUTEX_WAIT, count, &longest, nullptr, 0);
            count = uint32_t(*alarms(e));
            fence();
        }
        e.waits = 0;
    }
    fence();
    e.operations += 1;
}

// Notes the ranks that do not take part and are sent to. False, with nothing done, if an expert is out of range.
static bool check(Exchange& e, const int32_t* chosen, int64_t tokens) {
    int64_t all = e.ranks * e.slots;
    for (int64_t i = 0; i < tokens * e.top_k; ++i)
        if (chosen[i] < -1 || chosen[i] >= all) return false;
    for (int64_t i = 0; i < tokens * e.top_k; ++i)
        if (chosen[i] >= 0 && !e.reachable[chosen[i]]) e.missed[chosen[i] / e.slots] = 1, e.astray = 1;
    return true;
}

// What came for this rank's slots, ordered by (slot, source rank, token, k).
static void find_rows(Exchange& e) {
    int64_t mine = e.me * e.slots, per_rank = e.max_tokens * e.top_k, found = 0;
    std::fill(e.firsts, e.firsts + e.slots + 1, 0);
    // HAZARD: a rank that is masked meanwhile may write on: what is read of others is read once.
    for (int64_t rank = 0; rank < e.ranks; ++rank) {
        if (!e.live[rank]) continue;
        int64_t tokens = e.words[rank * STRIDE + 1], sent = std::clamp<int64_t>(tokens, 0, e.max_tokens) * e.top_k;
        const volatile int32_t* experts = e.experts + rank * per_rank;
        for (int64_t i = 0; i < sent; ++i) {
            int64_t slot = experts[i] - mine;
            if (slot < 0 || slot >= e.slots) continue;
            e.firsts[slot + 1] += 1;
            e.found[2 * found] = slot;
            e.found[2 * found + 1] = rank * per_rank + i;
            found += 1;
        }
    }
    for (int64_t slot = 0; slot < e.slots; ++slot) e.firsts[slot + 1] += e.firsts[slot];
    // Each slot's beginning is moved on to its end, and the ends back by one place.
    for (int64_t i = 0; i < found; ++i) e.rows[e.firsts[e.found[2 * i]]++] = e.found[2 * i + 1];
    for (int64_t slot = e.slots; slot > 0; --slot) e.firsts[slot] = e.firsts[slot - 1];
    e.firsts[0] = 0;
}

static bool dispatch(Exchange& e, const float* x, const int32_t* chosen, int64_t tokens) {
    if (tokens > e.max_tokens || !check(e, chosen, tokens)) return false;
    std::memcpy(e.x + e.me * e.max_tokens * e.hidden, x, tokens * e.hidden * sizeof(float));
    std::memcpy(e.experts + e.me * e.max_tokens * e.top_k, chosen, tokens * e.top_k * sizeof(int32_t));
    e.words[e.me * STRIDE + 1] = e.tokens = tokens;
    meet(e);
    find_rows(e);
    return true;
}

// The tokens of rows first, first + 1, ...: [count, hidden].
static void fetch(const Exchange& e, int64_t first, int64_t count, float* x) {
    for (int64_t i = 0; i < count; ++i)
        std::memcpy(x + i * e.hidden, e.x + e.rows[first + i] / e.top_k * e.hidden, e.hidden * sizeof(float));
}

static void give_back(const Exchange& e, int64_t first, int64_t count, const float* y) {
    for (int64_t i = 0; i < count; ++i)
        std::memcpy(e.boxes + e.rows[first + i] * e.hidden, y + i * e.hidden, e.hidden * sizeof(float));
}

// Of this rank's tokens: the sum over k, in order, of weights [tokens, top_k] times what has come back. One rounding for
// each product and each sum. What was sent to who does not take part is not read: it may be anything.
static void weighted_sum(const Exchange& e, const float* weights, float* out) {
    const int32_t* chosen = e.experts + e.me * e.max_tokens * e.top_k;
    const float* box = e.boxes + e.me * e.max_tokens * e.top_k * e.hidden;
    for (int64_t token = 0; token < e.tokens; ++token) {
        float* sum = out + token * e.hidden;
        std::fill(sum, sum + e.hidden, 0.0f);
        for (int64_t k = 0; k < e.top_k; ++k) {
            int64_t at = token * e.top_k + k;
            if (chosen[at] < 0 || !e.reachable[chosen[at]]) continue;
            V weight = all_of(weights[at]);
            in_lanes(box + at * e.hidden, e.hidden, [&](int64_t i, V v, int64_t count) {
                put(sum + i, take(sum + i, count) + v * weight, count);
            });
        }
    }
}
