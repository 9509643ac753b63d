// What happens to an expert's rows between its products, each in one pass. moe/sparse/compiled.py compiles it.
//
// n rows of one expert, M sources, D width, F expert width. Numbers are float or bf16 in memory, float at work:
// what is bf16 is rounded once, when it is stored.

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// As wide as the machine's vectors: compilers make poor code of wider ones.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr int64_t AHEAD = 8;  // rows: sources lie where no processor expects them, so they are asked for early

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// `lanes` numbers, and zeros up to LANES.
Floats load(const float* from, int64_t lanes) {
    Floats values = {};
    std::memcpy(&values, from, lanes * sizeof(float));
    return values;
}
Floats load(const bf16* from, int64_t lanes) {
    Halves halves = {};
    std::memcpy(&halves, from, lanes * sizeof(bf16));
    return same_bits<Floats>(__builtin_convertvector(halves, Words) << 16);
}

void store(float* to, Floats values, int64_t lanes) { std::memcpy(to, &values, lanes * sizeof(float)); }

// To the nearest, ties to even; NaN stays NaN. Processors with an instruction for it make 0 of a denormal.
void store(bf16* to, Floats values, int64_t lanes) {
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh(same_bits<__m512>(values));
#else
    Words bits = same_bits<Words>(values);
    Words rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    rounded = values == values ? rounded : Words{} + 0x7FC00000;
    Halves halves = __builtin_convertvector(rounded >> 16, Halves);
#endif
    std::memcpy(to, &halves, lanes * sizeof(bf16));
}

Floats at_most(Floats values, float limit) { return values > limit ? Floats{} + limit : values; }
Floats at_least(Floats values, float limit) { return values < limit ? Floats{} + limit : values; }

// exp by 2^n p(r), with x = n ln 2 + r and p Taylor's polynomial of degree 6: to 2 units in the last place. From 88.4
// on it is infinite, and nothing is less than exp(-87), which is no denormal yet.
Floats exp_of(Floats x) {
    x = at_least(at_most(x, 89.0f), -87.0f);
    const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
    Floats shifted = x * 1.44269504f + shift;
    Floats n = shifted - shift;
    Floats r = x - n * 0.693145752f;  // ln 2 in two parts, of which the first has few digits
    r = r - n * 1.42860677e-6f;
    Floats p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * same_bits<Floats>((same_bits<Words>(shifted) << 23) + 0x3F800000u);
}

Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp_of(-x)); }

// moe.sparse.activation.GatedUnit; without a limit, `limit` is infinite.
struct Unit {
    float alpha, offset, limit;
};

// `body(begin, lanes)` for a row of `width` numbers; `lanes` is LANES but at the end.
template <class Body>
void along(int64_t width, Body body) {
    int64_t begin = 0;
    for (; begin + LANES <= width; begin += LANES) body(begin, LANES);
    if (begin < width) body(begin, width - begin);
}

template <class From, class To>
void copy(const From* source_MD, const int64_t* source_n, To* out_nD, int64_t n, int64_t D) {
    for (int64_t row = 0; row < n; ++row) {
        const From* from = source_MD + source_n[row] * D;
        const From* later = source_MD + source_n[row + AHEAD < n ? row + AHEAD : row] * D;
        To* to = out_nD + row * D;
        along(D, [=](int64_t d, int64_t lanes) {
            __builtin_prefetch(later + d);
            if constexpr (std::is_same_v<From, To>) {
                std::memcpy(to + d, from + d, lanes * sizeof(To));
            } else {
                store(to + d, load(from + d, lanes), lanes);
            }
        });
    }
}

template <class T>
void add(const T* rows_nD, const int64_t* source_n, float* sums_MD, int64_t n, int64_t D) {
    for (int64_t row = 0; row < n; ++row) {
        const T* from = rows_nD + row * D;
        float* to = sums_MD + source_n[row] * D;
        const float* later = sums_MD + source_n[row + AHEAD < n ? row + AHEAD : row] * D;
        along(D, [=](int64_t d, int64_t lanes) {
            __builtin_prefetch(later + d, 1);
            store(to + d, load(to + d, lanes) + load(from + d, lanes), lanes);
        });
    }
}

// out = w g sigmoid(alpha g) (u + offset), with g and u limited.
template <class T>
void activate(Unit unit, const T* gate_up_n2F, const float* weight_n, T* out_nF, int64_t n, int64_t F) {
    for (int64_t row = 0; row < n; ++row) {
        const T* gate = gate_up_n2F + row * 2 * F;
        const T* up = gate + F;
        T* out = out_nF + row * F;
        float w = weight_n[row];
        along(F, [=](int64_t f, int64_t lanes) {
            Floats g = at_most(load(gate + f, lanes), unit.limit);
            Floats u = at_least(at_most(load(up + f, lanes), unit.limit), -unit.limit);
            store(out + f, w * (g * sigmoid(unit.alpha * g) * (u + unit.offset)), lanes);
        });
    }
}

// From the gradient of out / w: those of gate, up and w; and out again, over the gradient.
template <class T>
void differentiate(Unit unit, const T* gate_up_n2F, const float* weight_n, T* grad_nF, T* grad_gate_up_n2F,
                   float* grad_weight_n, int64_t n, int64_t F) {
    for (int64_t row = 0; row < n; ++row) {
        const T* gate = gate_up_n2F + row * 2 * F;
        const T* up = gate + F;
        T* grad = grad_nF + row * F;
        T* grad_gate = grad_gate_up_n2F + row * 2 * F;
        T* grad_up = grad_gate + F;
        float w = weight_n[row];
        Floats products = {};
        along(F, [=, &products](int64_t f, int64_t lanes) {
            Floats gate_f = load(gate + f, lanes), up_f = load(up + f, lanes), upstream = load(grad + f, lanes);
            Floats g = at_most(gate_f, unit.limit);
            Floats u = at_least(at_most(up_f, unit.limit), -unit.limit);
            Floats s = sigmoid(unit.alpha * g), activated = g * s, factor = u + unit.offset;
            Floats out = activated * factor;
            products += upstream * out;
            upstream *= w;
            // (g s)' = s + alpha g s (1 - s), and nothing passes a limit
            Floats slope = s + unit.alpha * activated * (1.0f - s), zero = {};
            Floats grad_g = upstream * factor * slope, grad_u = upstream * activated;
            store(grad_gate + f, gate_f > unit.limit ? zero : grad_g, lanes);
            store(grad_up + f, (up_f > unit.limit) | (up_f < -unit.limit) ? zero : grad_u, lanes);
            store(grad + f, w * out, lanes);
        });
        float sum = 0;
        for (int64_t lane = 0; lane < LANES; ++lane) sum += products[lane];
        grad_weight_n[row] = sum;
    }
}

}  // namespace

#define FOR_EACH_PRODUCT_DTYPE(T, NAME)                                                                               \
    void add_##NAME(const T* rows, const int64_t* source, float* sums, int64_t n, int64_t D) {                        \
        add(rows, source, sums, n, D);                                                                                \
    }                                                                                                                 \
    void activate_##NAME(float alpha, float offset, float limit, const T* gate_up, const float* weight, T* out,       \
                         int64_t n, int64_t F) {                                                                      \
        activate({alpha, offset, limit}, gate_up, weight, out, n, F);                                                 \
    }                                                                                                                 \
    void differentiate_##NAME(float alpha, float offset, float limit, const T* gate_up, const float* weight, T* grad, \
                              T* grad_gate_up, float* grad_weight, int64_t n, int64_t F) {                            \
        differentiate({alpha, offset, limit}, gate_up, weight, grad, grad_gate_up, grad_weight, n, F);                \
    }

extern "C" {
void copy_float32(const float* from, const int64_t* source, float* to, int64_t n, int64_t D) {
    copy(from, source, to, n, D);
}
void copy_bfloat16(const bf16* from, const int64_t* source, bf16* to, int64_t n, int64_t D) {
    copy(from, source, to, n, D);
}
void copy_bfloat16_to_float32(const bf16* from, const int64_t* source, float* to, int64_t n, int64_t D) {
    copy(from, source, to, n, D);
}
FOR_EACH_PRODUCT_DTYPE(float, float32)
FOR_EACH_PRODUCT_DTYPE(bf16, bfloat16)
}
