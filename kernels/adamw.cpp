// AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019) on split FP32 masters.
//
// A master weight is two 16-bit halves: hi = (bits + 0x8000) >> 16 is the BF16 weight and
// lo = bits - (hi << 16) the signed remainder; together they are the exact FP32 bits. A NaN is
// stored as (0x7FC0, 0). One pass reads and writes hi, lo, m, v and reads the gradient: 26 bytes
// per parameter with BF16 gradients.
//
// Rounding. Every operation below is one IEEE single-precision operation rounded to nearest; fma
// has one rounding; square root and division are rounded correctly; subnormals are kept. Another
// implementation that performs the same operations in this order gives the same bits:
//
//     g  = gradient * grad_scale
//     m' = fma(beta1, m, fma(comp1, g, fma(beta1_lo, m, comp1_lo * g)))
//     p  = comp2 * g
//     r  = fma(comp2_lo, g, fma(comp2, g, -p))
//     v' = fma(beta2, v, fma(p, g, fma(beta2_lo, v, r * g)))
//     d  = fma(sqrt(v'), inv_sqrt_bias2, eps)
//     w' = w - fma(step_size, m' / d, decay * w)
//
// beta + beta_lo and comp + comp_lo hold beta and 1 - beta to 48 bits, and p + r is their product
// with g as exactly. So m' and v' err by two roundings, at most 1.5 ulp of the larger addend, for
// any beta; with constants of single precision a stationary v would be off by 6e-5.
// step_size = lr / (1 - beta1^t), decay = lr * weight_decay and
// inv_sqrt_bias2 = 1 / sqrt(1 - beta2^t); the host computes the constants in double. Subtracting
// decay * w instead of multiplying by 1 - decay keeps decays that are small beside one ulp of 1.
//
// Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2) has
// no v: where its array is null, step_size = lr and
//
//     c  = fma(beta1, m, fma(comp1, g, fma(beta1_lo, m, comp1_lo * g)))
//     w' = w - fma(step_size, sign(c), decay * w)        sign(c) is 0 for zeros and for a NaN
//     m' = fma(beta2, m, fma(comp2, g, fma(beta2_lo, m, comp2_lo * g)))
//
// Moments of 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022) are codes
// in blocks of 128 elements that share a scale, the largest magnitude among them. Code c > 0 is the
// share of it whose bits are (c + 0x3F8 - top) << 20: top, 127 for m and 255 for v, is 1, and there
// are eight steps to each power of two. m has its sign in the highest bit. Blocks are decoded,
// updated as above and encoded again, for each segment that overlaps them:
//
//     x  = bits(gradient) + lo,  x *= 0x7FEB352D,  x ^= x >> 15,  x *= 0x2C1B3C6D   (lo before)
//     i  = min(1 / scale, the largest finite number)                           1 for a scale of 0
//     c  = clamp((bits(|value| * i) + (x >> 12) >> 20) - (0x3F8 - top), 0, top)
//
// Adding a hash below 2^20 rounds up in proportion to how near the next code is (Gupta et al., "Deep
// Learning with Limited Numerical Precision", 2015). A scale is at most the largest finite number.
//
// Otherwise elements are independent, so neither threads nor chunks nor vector width can change a
// result.
// The arrays of a call must not overlap. No function allocates memory or throws.

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <omp.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

extern "C" {

struct Constants {
    float beta1, beta1_lo, comp1, comp1_lo;
    float beta2, beta2_lo, comp2, comp2_lo;
    float inv_sqrt_bias2, eps, grad_scale;
};

struct Segment {
    int64_t begin, end;  // elements [begin, end)
    float step_size, decay;
};

}  // extern "C"

namespace {

using Bf16 = uint16_t;

constexpr int64_t kLine = 64;     // elements: two cache lines of the 16-bit arrays, four of FP32
constexpr int64_t kCopyBlock = 1 << 18;   // bytes that a thread copies at a time
constexpr int64_t kDenseBlock = 1 << 16;  // elements that a thread updates at a time
constexpr int64_t kShared = 128;  // elements whose 8-bit moments share a scale
constexpr int64_t kBlock = 1024;  // columns of a row whose gradient is summed at a time
constexpr int kLanes = 8;         // partial sums of a row's squares; fixed, so the order is too

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

inline float to_float(Bf16 bits) { return bit_cast<float>(uint32_t(bits) << 16); }
inline float to_float(float value) { return value; }

// Rounds to nearest and keeps subnormals whatever the calling thread has set: OpenMP's workers do
// not inherit its mode, so results would otherwise depend on the number of threads.
class DefaultRounding {
  public:
    DefaultRounding() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultRounding() { std::fesetenv(&saved_); }
    DefaultRounding(const DefaultRounding&) = delete;
    DefaultRounding& operator=(const DefaultRounding&) = delete;

  private:
    std::fenv_t saved_;
};

struct Range {
    int64_t begin, end;
};

// This thread's share of [begin, end), cut at multiples of kLine so that no line has two writers.
Range my_share(int64_t begin, int64_t end) {
    const int64_t first = begin / kLine;
    const int64_t lines = (end + kLine - 1) / kLine - first;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t from = (first + lines * thread / threads) * kLine;
    const int64_t to = (first + lines * (thread + 1) / threads) * kLine;
    return {from < begin ? begin : from, to > end ? end : to};
}

inline float load_master(uint16_t hi, int16_t lo) {
    return bit_cast<float>((uint32_t(hi) << 16) + uint32_t(int32_t(lo)));
}

inline void store_master(float value, uint16_t& hi, int16_t& lo) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t high = (bits + 0x8000u) >> 16;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    hi = uint16_t(nan ? 0x7FC0u : high);
    lo = int16_t(nan ? 0u : bits - (high << 16));
}

template <class Grad>
void lion_elements(uint16_t* __restrict hi, int16_t* __restrict lo, float* __restrict m_array,
                   const Grad* __restrict grad, int64_t n, float step_size, float decay,
                   const Constants k) {
    for (int64_t i = 0; i < n; ++i) {
        const float g = to_float(grad[i]) * k.grad_scale;
        const float w = load_master(hi[i], lo[i]);
        const float m = m_array[i];
        const float c = __builtin_fmaf(
            k.beta1, m, __builtin_fmaf(k.comp1, g, __builtin_fmaf(k.beta1_lo, m, k.comp1_lo * g)));
        const float sign = float(c > 0.0f) - float(c < 0.0f);
        store_master(w - __builtin_fmaf(step_size, sign, decay * w), hi[i], lo[i]);
        m_array[i] = __builtin_fmaf(
            k.beta2, m, __builtin_fmaf(k.comp2, g, __builtin_fmaf(k.beta2_lo, m, k.comp2_lo * g)));
    }
}

template <class Grad>
void update_elements(uint16_t* __restrict hi, int16_t* __restrict lo, float* __restrict m_array,
                     float* __restrict v_array, const Grad* __restrict grad, int64_t n,
                     float step_size, float decay, const Constants k) {
    for (int64_t i = 0; i < n; ++i) {
        const float g = to_float(grad[i]) * k.grad_scale;
        const float w = load_master(hi[i], lo[i]);
        float m = m_array[i];
        float v = v_array[i];

        m = __builtin_fmaf(
            k.beta1, m, __builtin_fmaf(k.comp1, g, __builtin_fmaf(k.beta1_lo, m, k.comp1_lo * g)));
        const float p = k.comp2 * g;
        const float r = __builtin_fmaf(k.comp2_lo, g, __builtin_fmaf(k.comp2, g, -p));
        v = __builtin_fmaf(
            k.beta2, v, __builtin_fmaf(p, g, __builtin_fmaf(k.beta2_lo, v, r * g)));
        const float d = __builtin_fmaf(__builtin_sqrtf(v), k.inv_sqrt_bias2, k.eps);
        store_master(w - __builtin_fmaf(step_size, m / d, decay * w), hi[i], lo[i]);
        m_array[i] = m;
        v_array[i] = v;
    }
}

// The master weights and moments of one call; v is null for Lion.
struct State {
    uint16_t* hi;
    int16_t* lo;
    float* m;
    float* v;

    // Elements [first, first + n); grad points to the gradient of the first of them.
    template <class Grad>
    void update(int64_t first, const Grad* grad, int64_t n, float step_size, float decay,
                const Constants& constants) const {
        if (v)
            update_elements(hi + first, lo + first, m + first, v + first, grad, n, step_size, decay,
                            constants);
        else
            lion_elements(hi + first, lo + first, m + first, grad, n, step_size, decay, constants);
    }
};

// Where it is inlined, the compiler knows that a whole block has 128 elements: nearly twice as fast.
#define SF_INLINE inline __attribute__((always_inline))

constexpr uint32_t kFirst = 127, kSecond = 255;  // highest codes of the 8-bit moments
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;     // all bits of a float but its sign

inline uint32_t rounding_noise(int16_t lo, float gradient) {
    uint32_t x = bit_cast<uint32_t>(gradient) + uint32_t(int32_t(lo));
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    return (x * 0x2C1B3C6Du) >> 12;
}

template <uint32_t kTop>
SF_INLINE void decode(const uint8_t* __restrict codes, float scale, int64_t n,
                      float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t code = codes[i] & kTop, sign = codes[i] & (0xFFu ^ kTop);
        const uint32_t bits = code ? (code + (0x3F8u - kTop)) << 20 : 0u;
        values[i] = bit_cast<float>(bits | sign << 24) * scale;
    }
}

template <uint32_t kTop>
SF_INLINE void encode(const float* __restrict values, const uint32_t* __restrict noise, int64_t n,
                      uint8_t* __restrict codes, float& scale) {
    uint32_t most = 0;  // as integers: magnitudes sort alike, and any order gives the same
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = bit_cast<uint32_t>(values[i]) & kMagnitude;
        most = magnitude > most ? magnitude : most;
    }
    scale = bit_cast<float>(most < 0x7F7FFFFFu ? most : 0x7F7FFFFFu);
    const float largest = std::numeric_limits<float>::max();
    const float ratio = most ? 1.0f / scale : 1.0f, inverse = ratio < largest ? ratio : largest;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(values[i]);
        const float share = bit_cast<float>(bits & kMagnitude) * inverse;
        int32_t code = int32_t((bit_cast<uint32_t>(share) + noise[i]) >> 20);
        code -= int32_t(0x3F8u - kTop);
        code = code < 0 ? 0 : code > int32_t(kTop) ? int32_t(kTop) : code;
        codes[i] = uint8_t(uint32_t(code) | (kTop == kFirst ? bits >> 31 << 7 : 0u));
    }
}

// The same with moments of 8 bits; scales are those of m and v of each block in turn.
struct State8 {
    uint16_t* hi;
    int16_t* lo;
    uint8_t* m;
    uint8_t* v;
    float* scales;
    int64_t numel;

    template <class Grad>
    void update(int64_t first, const Grad* grad, int64_t n, float step_size, float decay,
                const Constants& constants) const {
        for (int64_t begin = first / kShared * kShared; begin < first + n; begin += kShared) {
            const int64_t from = first > begin ? first : begin;
            const int64_t to = first + n < begin + kShared ? first + n : begin + kShared;
            const Grad* block_grad = grad + (begin - first);
            if (from == begin && to == begin + kShared)
                update_block(begin, block_grad, kShared, 0, kShared, step_size, decay, constants);
            else
                update_block(begin, block_grad, numel - begin < kShared ? numel - begin : kShared,
                             from - begin, to - begin, step_size, decay, constants);
        }
    }

    // The block of `count` elements from `begin` on, of which [from, to) have a step.
    template <class Grad>
    SF_INLINE void update_block(int64_t begin, const Grad* grad, int64_t count, int64_t from,
                                int64_t to, float step_size, float decay,
                                const Constants& constants) const {
        float m_block[kShared], v_block[kShared];
        uint32_t noise[kShared];
        float* scale = scales + begin / kShared * 2;
        for (int64_t i = 0; i < count; ++i)
            noise[i] = rounding_noise(lo[begin + i], to_float(grad[i]));
        decode<kFirst>(m + begin, scale[0], count, m_block);
        decode<kSecond>(v + begin, scale[1], count, v_block);
        update_elements(hi + begin + from, lo + begin + from, m_block + from, v_block + from,
                        grad + from, to - from, step_size, decay, constants);
        encode<kFirst>(m_block, noise, count, m + begin, scale[0]);
        encode<kSecond>(v_block, noise, count, v + begin, scale[1]);
    }
};

template <class State, class Grad>
void dense(State state, const Grad* grad, const Segment* segments, int64_t count,
           const Constants& constants, int threads) {
    if (count == 0) return;
    const int64_t first = segments[0].begin / kDenseBlock;
    const int64_t last = (segments[count - 1].end + kDenseBlock - 1) / kDenseBlock;
    // Cores also launch kernels and answer interrupts: whoever is free takes the next block, so one
    // late thread does not keep the others waiting.
#pragma omp parallel num_threads(threads)
    {
        const DefaultRounding rounding;
#pragma omp for schedule(dynamic)
        for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * kDenseBlock, end = begin + kDenseBlock;
            for (int64_t s = 0; s < count; ++s) {
                const Segment& segment = segments[s];
                const int64_t from = segment.begin > begin ? segment.begin : begin;
                const int64_t to = segment.end < end ? segment.end : end;
                if (from < to)
                    state.update(from, grad + from, to - from, segment.step_size, segment.decay,
                                 constants);
            }
        }
    }
}

// Which rows are updated, and which rows of dx belong to each.
struct RowTable {
    const int64_t* rows;
    const int64_t* starts;
    const int64_t* order;
    int64_t count, hidden;
};

// The gradient of listed rows: a dense part plus rows of dx, added in the order given.
template <class Dx, class Dense>
struct RowGradient : RowTable {
    const Dx* dx;
    const Dense* dense;  // may be null

    // Columns [column, column + width) of the gradient of the u-th listed row.
    void sum(int64_t u, int64_t column, int64_t width, float* __restrict out) const {
        if (dense) {
            const Dense* from = dense + rows[u] * hidden + column;
            for (int64_t j = 0; j < width; ++j) out[j] = to_float(from[j]);
        } else {
            for (int64_t j = 0; j < width; ++j) out[j] = 0.0f;
        }
        for (int64_t k = starts[u]; k < starts[u + 1]; ++k) {
            const Dx* from = dx + order[k] * hidden + column;
            for (int64_t j = 0; j < width; ++j) out[j] += to_float(from[j]);
        }
    }

    // Not finite exactly if an element is not: squares of finite FP32 values fit into double.
    double sum_of_squares(int64_t u) const {
        double lane[kLanes] = {};
        float block[kBlock];
        for (int64_t column = 0; column < hidden; column += kBlock) {
            const int64_t width = hidden - column < kBlock ? hidden - column : kBlock;
            sum(u, column, width, block);
            int64_t j = 0;
            for (; j + kLanes <= width; j += kLanes)
                for (int l = 0; l < kLanes; ++l)
                    lane[l] += double(block[j + l]) * double(block[j + l]);
            for (; j < width; ++j) lane[0] += double(block[j]) * double(block[j]);
        }
        double total = 0.0;
        for (double partial : lane) total += partial;
        return total;
    }
};

// The sum of squares of each listed row's gradient, into row_sums[count].
template <class Dx, class Dense>
void square_rows(const RowTable& table, const Dx* dx, const Dense* dense, double* row_sums,
                 int threads) {
    const RowGradient<Dx, Dense> gradient{table, dx, dense};
    // Rows of frequent tokens cost far more than others, hence the dynamic schedule. Which thread
    // takes a row does not show in the result.
#pragma omp parallel num_threads(threads)
    {
        const DefaultRounding rounding;
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < gradient.count; ++u) row_sums[u] = gradient.sum_of_squares(u);
    }
}

// Sums each gradient twice, first to check it and then to apply it: reading dx again is cheaper
// than keeping a matrix of sums.
template <class Dx, class Dense>
double update_rows(State state, const RowTable& table, const Dx* dx, const Dense* dense,
                   float step_size, float decay, const Constants& constants, double* row_sums,
                   int threads) {
    const RowGradient<Dx, Dense> gradient{table, dx, dense};
    const int64_t count = table.count, hidden = table.hidden;
    square_rows(table, dx, dense, row_sums, threads);
    double total = 0.0;
    for (int64_t u = 0; u < count; ++u) total += row_sums[u];
    if (!std::isfinite(total)) return std::numeric_limits<double>::quiet_NaN();
#pragma omp parallel num_threads(threads)
    {
        const DefaultRounding rounding;
        float block[kBlock];
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < count; ++u) {
            for (int64_t column = 0; column < hidden; column += kBlock) {
                const int64_t width = hidden - column < kBlock ? hidden - column : kBlock;
                gradient.sum(u, column, width, block);
                state.update(table.rows[u] * hidden + column, block, width, step_size, decay,
                             constants);
            }
        }
    }
    return total;
}

// Calls run(dx, dense) with pointers of the element types that the flags name.
template <class Run>
auto with_types(const void* dx, int dx_is_fp32, const void* dense, int dense_is_fp32,
                const Run& run) {
    const auto run_dx = [&](const auto* dx_rows) {
        return dense_is_fp32 ? run(dx_rows, static_cast<const float*>(dense))
                             : run(dx_rows, static_cast<const Bf16*>(dense));
    };
    return dx_is_fp32 ? run_dx(static_cast<const float*>(dx))
                      : run_dx(static_cast<const Bf16*>(dx));
}

// Copies memory past the caches: a line that is written whole is then not read before.
void copy_past_caches(char* to, const char* from, int64_t nbytes) {
    int64_t i = 0;
#ifdef __SSE2__
    for (; i < nbytes && reinterpret_cast<uintptr_t>(to + i) % sizeof(__m128i); ++i) to[i] = from[i];
    for (; i + int64_t(sizeof(__m128i)) <= nbytes; i += sizeof(__m128i))
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm_sfence();
#endif
    std::memcpy(to + i, from + i, nbytes - i);
}

}  // namespace

extern "C" {

// Updates the elements of sorted, disjoint segments; elements outside them stay as they are.
void adamw_dense(uint16_t* hi, int16_t* lo, float* m, float* v, const void* grad, int grad_is_fp32,
                 const Segment* segments, int64_t count, const Constants* constants, int threads) {
    const State state{hi, lo, m, v};
    if (grad_is_fp32)
        dense(state, static_cast<const float*>(grad), segments, count, *constants, threads);
    else
        dense(state, static_cast<const Bf16*>(grad), segments, count, *constants, threads);
}

// The same with moments of 8 bits; hi points to the first of numel elements, and a block.
void adamw8_dense(uint16_t* hi, int16_t* lo, uint8_t* m, uint8_t* v, float* scales, int64_t numel,
                  const void* grad, int grad_is_fp32, const Segment* segments, int64_t count,
                  const Constants* constants, int threads) {
    const State8 state{hi, lo, m, v, scales, numel};
    if (grad_is_fp32)
        dense(state, static_cast<const float*>(grad), segments, count, *constants, threads);
    else
        dense(state, static_cast<const Bf16*>(grad), segments, count, *constants, threads);
}

// Updates distinct rows of a matrix [V, hidden]. The gradient of row rows[u] is its row of
// dense_grad [V, hidden] (zero if null) plus, in FP32 and in this order, the rows order[k] of
// dx [N, hidden] for starts[u] <= k < starts[u + 1]. Returns the sum of squares of these gradients;
// if one is not finite, returns NaN and writes no state. row_sums is scratch for count doubles.
double adamw_rows(uint16_t* hi, int16_t* lo, float* m, float* v, const int64_t* rows,
                  const int64_t* starts, const int64_t* order, int64_t count, const void* dx,
                  int dx_is_fp32, const void* dense_grad, int dense_is_fp32, int64_t hidden,
                  float step_size, float decay, const Constants* constants, double* row_sums,
                  int threads) {
    const State state{hi, lo, m, v};
    const RowTable table{rows, starts, order, count, hidden};
    return with_types(
        dx, dx_is_fp32, dense_grad, dense_is_fp32, [&](const auto* dx_rows, const auto* dense) {
            return update_rows(state, table, dx_rows, dense, step_size, decay, *constants,
                               row_sums, threads);
        });
}

// The sum of squares of the gradient of each of these rows, into row_sums[count].
void adamw_row_squares(const int64_t* rows, const int64_t* starts, const int64_t* order,
                       int64_t count, const void* dx, int dx_is_fp32, const void* dense_grad,
                       int dense_is_fp32, int64_t hidden, double* row_sums, int threads) {
    const RowTable table{rows, starts, order, count, hidden};
    with_types(dx, dx_is_fp32, dense_grad, dense_is_fp32,
               [&](const auto* dx_rows, const auto* dense) {
                   square_rows(table, dx_rows, dense, row_sums, threads);
               });
}

// x = 1 - x for three arrays of n elements: 24 bytes of traffic an element and hardly any
// arithmetic, so this is the rate that an update in place can reach.
void stream_rmw(float* a, float* b, float* c, int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Range share = my_share(0, n);
        for (int64_t i = share.begin; i < share.end; ++i) {
            a[i] = 1.0f - a[i];
            b[i] = 1.0f - b[i];
            c[i] = 1.0f - c[i];
        }
    }
}

// Copies memory that is not used again soon.
void stream_copy(char* to, const char* from, int64_t nbytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t begin = 0; begin < nbytes; begin += kCopyBlock)
        copy_past_caches(to + begin, from + begin,
                         nbytes - begin < kCopyBlock ? nbytes - begin : kCopyBlock);
}

}  // extern "C"
