// A rank's forward pass on a processor, in calls that hold no interpreter lock. Plain C between it and Python (library.py),
// whose structures are laid out alike: 64-bit integers, doubles and addresses only.

#include "attention.h"
#include "exchange.h"

enum QkNorm : int64_t { NONE, HEAD, PROJECTION };

// Matrices: of floats, or of `Half` if `Model::halves`.
struct Layer {
    const float *input_norm, *qk_norm, *post_norm;
    const void *qkv, *out, *gate, *gate_up, *down;
    float* cache;
    const int64_t* physical;  // [experts]
    int64_t* load;            // [slots]
};

struct Model {
    int64_t layer_count, hidden, vocab, heads, kv_heads, head_dim, qk_norm, experts, top_k, inner, renormalise, slots;
    int64_t page_size, pages, halves, max_tokens, max_samples, positions;
    double eps, clip;
    const void *embed, *lm_head;
    const float *final_norm, *cosines, *sines;
    const Layer* layers;
    // Of the step: [max_tokens, ...] each.
    float *x, *h, *mixture, *weights;
    int32_t* chosen;
    float* logits;   // [max_sequences, vocab]
    float *wide, *narrow, *line;  // scratch: see fused_model.py
    int64_t mixed;   // layers of the step whose experts are done
};

// A step's batch: `chunks` runs of consecutive tokens, each of one sequence.
struct Batch {
    int64_t tokens, chunks, samples, listed;
    const int64_t* ids;        // [tokens]
    const int64_t* starts;     // [chunks]: position of the first token
    const int64_t* lengths;    // [chunks]
    const int64_t* tables;     // [chunks]: where in `pages` the sequence's begin
    const int64_t* pages;      // [listed]
    const int64_t* sampled;    // [samples]: tokens whose logits are wanted
};

// y [rows, width] = x [rows, inner] times the matrix that begins `skipped` numbers after `w`.
static void product(const Model& m, const float* x, int64_t rows, int64_t inner, const void* w, int64_t width, float* y,
                    int64_t skipped = 0) {
    if (m.halves)
        linear(x, rows, inner, static_cast<const Half*>(w) + skipped, width, y);
    else
        linear(x, rows, inner, static_cast<const float*>(w) + skipped, width, y);
}

// Whether nothing of the batch is outside of what there is memory for.
static bool fits(const Model& m, const Batch& b) {
    if (b.tokens > m.max_tokens || b.samples > m.max_samples) return false;
    for (int64_t i = 0; i < b.tokens; ++i)
        if (b.ids[i] < 0 || b.ids[i] >= m.vocab) return false;
    for (int64_t i = 0; i < b.listed; ++i)
        if (b.pages[i] < 0 || b.pages[i] >= m.pages) return false;
    for (int64_t i = 0; i < b.samples; ++i)
        if (b.sampled[i] < 0 || b.sampled[i] >= b.tokens) return false;
    int64_t tokens = 0;
    for (int64_t chunk = 0; chunk < b.chunks; ++chunk) {
        int64_t start = b.starts[chunk], length = b.lengths[chunk], table = b.tables[chunk];
        int64_t next = chunk + 1 < b.chunks ? b.tables[chunk + 1] : b.listed;
        if (start < 0 || length < 0 || start > m.positions - length) return false;
        if (table < 0 || next > b.listed || start + length > (next - table) * m.page_size) return false;
        tokens += length;
    }
    return tokens == b.tokens;
}

static void embed(const Model& m, int64_t token, float* x) {
    int64_t first = token * m.hidden;
    for (int64_t i = 0; i < m.hidden; ++i)
        x[i] = m.halves ? wide(static_cast<const Half*>(m.embed)[first + i]) : static_cast<const float*>(m.embed)[first + i];
}

static Cache cache_of(const Model& m, const Layer& layer) {
    return {layer.cache, m.kv_heads, m.pages, m.page_size, m.head_dim};
}

// qkv [(heads + 2 * kv_heads) * dim] of one token at `position`: normed, clamped, rotated; keys and values to the cache.
static void rotate_and_write(const Model& m, const Layer& layer, float* qkv, int64_t position, int64_t page) {
    int64_t dim = m.head_dim, rotated = m.heads + m.kv_heads, queries = m.heads * dim, keys = m.kv_heads * dim;
    if (m.qk_norm == HEAD) {
        for (int64_t head = 0; head < rotated; ++head)
            rms_norm(qkv + head * dim, dim, layer.qk_norm + head * dim, m.eps, qkv + head * dim);
    } else if (m.qk_norm == PROJECTION) {
        rms_norm(qkv, queries, layer.qk_norm, m.eps, qkv);
        rms_norm(qkv + queries, keys, layer.qk_norm + queries, m.eps, qkv + queries);
    }
    if (!std::isinf(m.clip)) clamp(qkv, queries + 2 * keys, m.clip);
    for (int64_t head = 0; head < rotated; ++head)
        rotate(qkv + head * dim, dim, m.cosines + position * dim, m.sines + position * dim);
    Cache cache = cache_of(m, layer);
    int64_t within = position % m.page_size * dim;
    for (int64_t head = 0; head < m.kv_heads; ++head) {
        std::memcpy(cache.keys(head, page) + within, qkv + queries + head * dim, dim * sizeof(float));
        std::memcpy(cache.values(head, page) + within, qkv + queries + keys + head * dim, dim * sizeof(float));
    }
}

// chosen [top_k], weights [top_k] of logits [experts], in place. Ties go to the lower expert; NaN breaks nothing.
static void choose(const Model& m, const Layer& layer, float* logits, int32_t* chosen, float* weights) {
    float share_of_one = 1.0f / exponentials(logits, m.experts), sum = 0.0f;
    for (int64_t k = 0; k < m.top_k; ++k) {
        int64_t best = -1;
        for (int64_t expert = 0; expert < m.experts; ++expert)
            if (logits[expert] != -1.0f && (best < 0 || logits[expert] > logits[best])) best = expert;
        weights[k] = logits[best] * share_of_one;
        chosen[k] = int32_t(layer.physical[best]);
        logits[best] = -1.0f;  // taken
        sum += weights[k];
    }
    if (m.renormalise)
        for (int64_t k = 0; k < m.top_k; ++k) weights[k] /= sum;
}

extern "C" {

// What this was built from.
const char* fused_sources() { return SOURCES; }

// x [tokens, hidden] and no mixture yet. 0 if the batch does not fit.
int64_t fused_begin(Model* m, const Batch* b) {
    m->mixed = 0;
    if (!fits(*m, *b)) return 0;
    for (int64_t i = 0; i < b->tokens; ++i) embed(*m, b->ids[i], m->x + i * m->hidden);
    return 1;
}

// From x and the mixture of the layer before to x, h, chosen and weights of this one.
void fused_attention(Model* m, const Batch* b, int64_t index) {
    const Layer& layer = m->layers[index];
    int64_t width = (m->heads + 2 * m->kv_heads) * m->head_dim, hidden = m->hidden;
    if (index) add(m->x, m->mixture, b->tokens * hidden);
    for (int64_t i = 0; i < b->tokens; ++i)
        rms_norm(m->x + i * hidden, hidden, layer.input_norm, m->eps, m->h + i * hidden);
    product(*m, m->h, b->tokens, hidden, layer.qkv, width, m->wide);
    float* row = m->wide;
    for (int64_t chunk = 0; chunk < b->chunks; ++chunk) {
        const int64_t* table = b->pages + b->tables[chunk];
        for (int64_t at = b->starts[chunk], end = at + b->lengths[chunk]; at < end; ++at, row += width)
            rotate_and_write(*m, layer, row, at, table[at / m->page_size]);
    }
    float *out = m->narrow, *queries = m->wide;
    for (int64_t chunk = 0; chunk < b->chunks; ++chunk) {
        const int64_t* table = b->pages + b->tables[chunk];
        for (int64_t i = 0; i < b->lengths[chunk]; ++i, queries += width, out += m->heads * m->head_dim)
            attend(cache_of(*m, layer), m->heads, table, b->starts[chunk] + i + 1, queries, m->line, out);
    }
    product(*m, m->narrow, b->tokens, m->heads * m->head_dim, layer.out, hidden, m->h);
    add(m->x, m->h, b->tokens * hidden);
    for (int64_t i = 0; i < b->tokens; ++i)
        rms_norm(m->x + i * hidden, hidden, layer.post_norm, m->eps, m->h + i * hidden);
    product(*m, m->h, b->tokens, hidden, layer.gate, m->experts, m->narrow);
    for (int64_t i = 0; i < b->tokens; ++i)
        choose(*m, layer, m->narrow + i * m->experts, m->chosen + i * m->top_k, m->weights + i * m->top_k);
}

// Both operations of a layer's exchange, and this rank's experts between them. 0 if an expert is out of range.
int64_t fused_mixture(Model* m, Exchange* e, int64_t index, int64_t tokens) {
    const Layer& layer = m->layers[index];
    if (!dispatch(*e, m->h, m->chosen, tokens)) return 0;
    for (int64_t slot = 0; slot < m->slots; ++slot) {
        int64_t inner = m->inner, hidden = m->hidden;
        for (int64_t first = e->firsts[slot]; first < e->firsts[slot + 1]; first += e->max_tokens) {
            int64_t count = std::min(e->max_tokens, e->firsts[slot + 1] - first);
            fetch(*e, first, count, m->narrow);
            product(*m, m->narrow, count, hidden, layer.gate_up, 2 * inner, m->wide, slot * hidden * 2 * inner);
            for (int64_t i = 0; i < count; ++i) swiglu(m->wide + i * 2 * inner, inner, m->narrow + i * inner);
            product(*m, m->narrow, count, inner, layer.down, hidden, m->wide, slot * inner * hidden);
            give_back(*e, first, count, m->wide);
        }
        layer.load[slot] += e->firsts[slot + 1] - e->firsts[slot];
    }
    meet(*e);
    weighted_sum(*e, m->weights, m->mixture);
    m->mixed = index + 1;
    return 1;
}

// logits [samples, vocab]
void fused_logits(Model* m, const Batch* b) {
    int64_t hidden = m->hidden;
    for (int64_t i = 0; i < b->samples; ++i) {
        float *x = m->x + b->sampled[i] * hidden, *h = m->h + i * hidden;
        add(x, m->mixture + b->sampled[i] * hidden, hidden);
        rms_norm(x, hidden, m->final_norm, m->eps, h);
    }
    product(*m, m->h, b->samples, hidden, m->lm_head, m->vocab, m->logits);
}

// A whole step; of no tokens, too. 0 if the batch does not fit, or an expert is out of range.
int64_t fused_forward(Model* m, const Batch* b, Exchange* e) {
    if (!fused_begin(m, b)) return 0;
    for (int64_t index = 0; index < m->layer_count; ++index) {
        if (b->tokens) fused_attention(m, b, index);
        if (!fused_mixture(m, e, index, b->tokens)) return 0;
    }
    if (b->samples) fused_logits(m, b);
    return 1;
}

int64_t fused_dispatch(Exchange* e, const float* x, const int32_t* chosen, int64_t tokens) {
    return dispatch(*e, x, chosen, tokens);
}

// packed [slots, capacity, hidden]; rows beyond a slot's own stay as they are.
void fused_fetch(const Exchange* e, float* packed, int64_t capacity) {
    for (int64_t slot = 0; slot < e->slots; ++slot)
        fetch(*e, e->firsts[slot], e->firsts[slot + 1] - e->firsts[slot], packed + slot * capacity * e->hidden);
}

// y like `packed`; out [tokens, hidden].
void fused_combine(Exchange* e, const float* y, int64_t capacity, const float* weights, float* out) {
    for (int64_t slot = 0; slot < e->slots; ++slot)
        give_back(*e, e->firsts[slot], e->firsts[slot + 1] - e->firsts[slot], y + slot * capacity * e->hidden);
    meet(*e);
    weighted_sum(*e, weights, out);
}

}  // extern "C"
