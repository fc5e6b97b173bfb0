#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "decode.h"

namespace bandcrop {
namespace {

typedef float Lanes __attribute__((vector_size(32)));  // 8 floats
typedef float UnalignedLanes __attribute__((vector_size(32), aligned(4), may_alias));

[[gnu::always_inline]] inline Lanes load(const float* from) {
    return *reinterpret_cast<const UnalignedLanes*>(from);
}
[[gnu::always_inline]] inline void store(const Lanes& lanes, float* to) {
    *reinterpret_cast<UnalignedLanes*>(to) = lanes;
}

double cubic(double x) {  // Keys (1981), a = -0.5
    x = std::fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
    return 0;
}

// Transposes 8 x 8 floats in registers.
[[gnu::always_inline]] inline void transpose8(Lanes (&r)[8]) {
    Lanes a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = pick<0, 8, 1, 9, 4, 12, 5, 13>(r[i], r[i + 1]);
        a[i + 1] = pick<2, 10, 3, 11, 6, 14, 7, 15>(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = pick<0, 1, 8, 9, 4, 5, 12, 13>(a[i], a[i + 2]);
        b[i + 1] = pick<2, 3, 10, 11, 6, 7, 14, 15>(a[i], a[i + 2]);
        b[i + 2] = pick<0, 1, 8, 9, 4, 5, 12, 13>(a[i + 1], a[i + 3]);
        b[i + 3] = pick<2, 3, 10, 11, 6, 7, 14, 15>(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(b[i], b[i + 4]);
        r[i + 4] = pick<4, 5, 6, 7, 12, 13, 14, 15>(b[i], b[i + 4]);
    }
}

// Eight outputs of eight rows: r[i] is output o[i] of each row. Taps known to the compiler unroll.
template <std::size_t taps_known>
[[gnu::always_inline]] inline void weigh(const Axis& axis, const float* turned,
                                         const std::size_t (&o)[8], Lanes (&r)[8]) {
    const std::size_t taps = taps_known != 0 ? taps_known : axis.taps;
    const float *in[8], *weight[8];
    for (int i = 0; i < 8; ++i) {
        in[i] = turned + std::size_t{axis.first[o[i]]} * 8;
        weight[i] = axis.weight.data() + o[i] * taps;
        r[i] = Lanes{};
    }
    for (std::size_t k = 0; k < taps; ++k)
        for (int i = 0; i < 8; ++i) r[i] += load(in[i] + k * 8) * weight[i][k];
}

// Resamples 8 rows across: lines [8][line_stride] -> out [8][out_stride], outputs rounded up to a
// multiple of 8. turned has line_stride x 8 floats.
[[gnu::always_inline]] inline void across8(const float* lines, std::size_t line_stride,
                                           const Axis& axis, bool flips, float* turned, float* out,
                                           std::size_t out_stride) {
    const std::size_t inputs = axis.high - axis.low;
    for (std::size_t x = 0; x < inputs; x += 8) {
        Lanes r[8];
        for (std::size_t i = 0; i < 8; ++i) r[i] = load(lines + i * line_stride + x);
        transpose8(r);
        for (std::size_t i = 0; i < 8; ++i) store(r[i], turned + (x + i) * 8);
    }
    for (std::size_t x = 0; x < axis.outputs; x += 8) {
        std::size_t o[8];
        for (std::size_t i = 0; i < 8; ++i) {
            // Outputs past the last repeat it; a flip asks for the outputs from the other end.
            const std::size_t at = std::min<std::size_t>(x + i, axis.outputs - 1);
            o[i] = flips ? axis.outputs - 1 - at : at;
        }
        Lanes r[8];
        if (axis.taps == 4)  // enlarging
            weigh<4>(axis, turned, o, r);
        else
            weigh<0>(axis, turned, o, r);
        transpose8(r);
        for (std::size_t i = 0; i < 8; ++i) store(r[i], out + i * out_stride + x);
    }
}

// One output row: the weighted sum of `taps` rows of `stride` floats, the first `width` of them.
[[gnu::always_inline]] inline void down_row(const float* rows, std::size_t stride,
                                            const float* weight, std::size_t taps,
                                            std::size_t width, float* out) {
    std::size_t x = 0;
    for (; x + 64 <= width; x += 64) {
        Lanes sum[8] = {};
        for (std::size_t k = 0; k < taps; ++k)
            for (std::size_t j = 0; j < 8; ++j)
                sum[j] += load(rows + k * stride + x + 8 * j) * weight[k];
        for (std::size_t j = 0; j < 8; ++j) store(sum[j], out + x + 8 * j);
    }
    for (; x < width; x += 8) {  // the rows are padded to 8, the output is not
        Lanes sum{};
        for (std::size_t k = 0; k < taps; ++k) sum += load(rows + k * stride + x) * weight[k];
        std::memcpy(out + x, &sum, std::min<std::size_t>(8, width - x) * sizeof(float));
    }
}

[[gnu::always_inline]] inline void transpose(const float* from, std::size_t height,
                                             std::size_t width, float* to) {
    std::size_t y = 0;
    for (; y + 8 <= height; y += 8) {
        std::size_t x = 0;
        for (; x + 8 <= width; x += 8) {
            Lanes r[8];
            for (std::size_t i = 0; i < 8; ++i) r[i] = load(from + (y + i) * width + x);
            transpose8(r);
            for (std::size_t i = 0; i < 8; ++i) store(r[i], to + (x + i) * height + y);
        }
        for (; x < width; ++x)
            for (std::size_t i = 0; i < 8; ++i) to[x * height + y + i] = from[(y + i) * width + x];
    }
    for (; y < height; ++y)
        for (std::size_t x = 0; x < width; ++x) to[x * height + y] = from[y * width + x];
}

// The three kernels, once for every processor and once for those with AVX2 and FMA.
struct Kernels {
    decltype(&across8) across;
    decltype(&down_row) down;
    decltype(&transpose) turn;
};

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void across_wide(const float* lines, std::size_t line_stride,
                                             const Axis& axis, bool flips, float* turned,
                                             float* out, std::size_t out_stride) {
    across8(lines, line_stride, axis, flips, turned, out, out_stride);
}
[[gnu::target("avx2,fma")]] void down_wide(const float* rows, std::size_t stride,
                                           const float* weight, std::size_t taps, std::size_t width,
                                           float* out) {
    down_row(rows, stride, weight, taps, width, out);
}
[[gnu::target("avx2,fma")]] void turn_wide(const float* from, std::size_t height, std::size_t width,
                                           float* to) {
    transpose(from, height, width, to);
}
#endif

Kernels kernels() {
#if defined(__x86_64__)
    if (has_wide_vectors()) return {across_wide, down_wide, turn_wide};
#endif
    return {across8, down_row, transpose};
}

std::size_t padded(std::size_t count) {
    return (count + 7) / 8 * 8;
}

}  // namespace

void Axis::set(double start, double stop, std::uint32_t inputs, std::uint32_t wanted) {
    const auto whole = [](double x) {
        return std::fabs(x - std::round(x)) < 1e-6 ? std::round(x) : x;
    };
    start = std::clamp(whole(start), 0.0, static_cast<double>(inputs));
    stop = std::clamp(whole(stop), start, static_cast<double>(inputs));
    if (start == start_ && stop == stop_ && inputs == inputs_ && wanted == outputs) return;
    inputs_ = 0;  // no setting, should memory run out below
    start_ = start;
    stop_ = stop;
    outputs = wanted;
    copies = start == std::round(start) && stop - start == wanted;
    if (copies) {
        low = static_cast<std::uint32_t>(start);
        high = low + wanted;
        inputs_ = inputs;
        return;
    }
    // PIL's precompute_coeffs (Resample.c).
    const double scale = (stop - start) / wanted, widening = std::max(scale, 1.0);
    const double support = 2 * widening;
    const auto left = [&](double center) {
        return static_cast<std::int64_t>(std::max(center - support + 0.5, 0.0));
    };
    const auto right = [&](double center) {
        return std::min(static_cast<std::int64_t>(center + support + 0.5), std::int64_t{inputs});
    };
    low = static_cast<std::uint32_t>(left(start + 0.5 * scale));
    high = static_cast<std::uint32_t>(right(start + (wanted - 0.5) * scale));
    taps = 0;
    for (std::uint32_t i = 0; i < wanted; ++i) {
        const double center = start + (i + 0.5) * scale;
        taps = std::max(taps, static_cast<std::uint32_t>(right(center) - left(center)));
    }
    first.resize(wanted);
    weight.assign(std::size_t{wanted} * taps, 0.0f);
    for (std::uint32_t i = 0; i < wanted; ++i) {
        const double center = start + (i + 0.5) * scale;
        const std::int64_t from = left(center), to = right(center);
        // All outputs have the same number of taps: near the end they begin earlier, with zeros.
        const std::int64_t begin = std::min<std::int64_t>(from, std::int64_t{high} - taps);
        first[i] = static_cast<std::uint32_t>(begin - low);
        float* w = weight.data() + std::size_t{i} * taps;
        double sum = 0;
        for (std::int64_t x = from; x < to; ++x) {
            const double value = cubic((static_cast<double>(x) - center + 0.5) / widening);
            w[x - begin] = static_cast<float>(value);
            sum += value;
        }
        for (std::uint32_t k = 0; k < taps; ++k) w[k] = static_cast<float>(w[k] / sum);
    }
    inputs_ = inputs;
}

void Resampler::begin(const Axis& down, const Axis& across, unsigned orient, float* out) {
    down_ = &down;
    across_ = &across;
    transposes_ = (orient & 4) != 0;
    // Flips before a transposition are the other flips after it.
    flips_rows_ = (orient & (transposes_ ? 1 : 2)) != 0;
    flips_columns_ = (orient & (transposes_ ? 2 : 1)) != 0;
    straight_ = down.copies && across.copies;
    pushed_ = waiting_ = 0;
    out_ = out;
    if (transposes_) out_ = upright_.reserve(std::size_t{down.outputs} * across.outputs);
    finished_ = out;
    stride_ = padded(across.outputs);
    if (!straight_) plane_.reserve(padded(down.high - down.low) * stride_);
    if (!across.copies) {
        line_stride_ = padded(across.high - across.low);
        float* lines = lines_.reserve(block * line_stride_);
        turned_.reserve(block * line_stride_);
        // The padding is transposed along, never weighted: any number does, but not garbage.
        for (std::size_t i = 0; i < block; ++i)
            std::fill(lines + i * line_stride_ + (across.high - across.low),
                      lines + (i + 1) * line_stride_, 0.0f);
    }
}

std::size_t Resampler::space() const {
    return across_->copies ? down_->high - down_->low - pushed_ : block - waiting_;
}

float* Resampler::rows(std::ptrdiff_t& step) {
    step = static_cast<std::ptrdiff_t>(straight_         ? across_->outputs
                                       : across_->copies ? stride_
                                                         : line_stride_);
    if (!across_->copies) return lines_.data() + waiting_ * line_stride_;
    if (!straight_) return plane_row(pushed_);
    float* const to =
        out_ + (flips_rows_ ? down_->outputs - 1 - pushed_ : pushed_) * across_->outputs;
    if (flips_rows_) step = -step;
    return to;
}

void Resampler::push(std::size_t count) {
    if (across_->copies && flips_columns_) {
        std::ptrdiff_t step;
        float* row = rows(step);
        for (std::size_t i = 0; i < count; ++i, row += step)
            std::reverse(row, row + across_->outputs);
    }
    pushed_ += count;
    if (across_->copies) return;
    waiting_ += count;
    if (waiting_ == block) flush();
}

void Resampler::flush() {
    kernels().across(lines_.data(), line_stride_, *across_, flips_columns_, turned_.data(),
                     plane_row(pushed_ - waiting_), stride_);
    waiting_ = 0;
}

void Resampler::finish() {
    if (waiting_ > 0) {
        // Fill the last block up; the plane has room for what becomes of it.
        for (std::size_t i = waiting_; i < block; ++i)
            std::copy_n(lines_.data(), line_stride_, lines_.data() + i * line_stride_);
        flush();
    }
    const Kernels run = kernels();
    const std::size_t width = across_->outputs;
    const std::size_t outputs = straight_ ? 0 : down_->outputs;
    const auto row = [&](std::size_t y) {
        return out_ + (flips_rows_ ? outputs - 1 - y : y) * width;
    };
    for (std::size_t y = 0; y < outputs; ++y) {
        // Memory that was last written a batch ago is far away: have a later row fetched meanwhile.
        if (y + 2 < outputs)
            for (std::size_t x = 0; x < width; x += 16) __builtin_prefetch(row(y + 2) + x, 1);
        if (down_->copies)
            std::copy_n(plane_row(y), width, row(y));
        else
            run.down(plane_row(down_->first[y]), stride_, down_->weight.data() + y * down_->taps,
                     down_->taps, width, row(y));
    }
    if (transposes_) run.turn(out_, down_->outputs, width, finished_);
}

}  // namespace bandcrop
