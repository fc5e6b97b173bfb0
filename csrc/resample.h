// resample: a window of rows -> an output grid, as PIL's resize(BICUBIC, box=...) does on mode "F".
//
// Promises
// - Bicubic, a = -0.5; the kernel widens with the scale when shrinking (antialiasing) and sees the
//   samples around the window, as PIL's does. First across, then down.
// - A window of whole pixels, as large as the output, is copied exactly.
// - Memory: rows needed x output width floats for each channel, kept from sample to sample.
// - Throws nothing but std::bad_alloc; no global state. A Resampler belongs to one thread.
//
// Does not: read files, or know Python or threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tiff.h"

namespace bandcrop {

// The most pixels of a window on a side: what a Resampler keeps grows with them, and a tiny file
// may claim billions.
constexpr double longest_window = 65536;

// How one axis of the output is made: output i is the sum over k < taps of
// weight[i * taps + k] x input[first[i] + k], inputs counted from `low`.
struct Axis {
    std::uint32_t low = 0, high = 0;  // the inputs needed, low .. high - 1
    std::uint32_t outputs = 0;
    bool copies = false;  // output i is input low + i
    std::uint32_t taps = 0;
    std::vector<std::uint32_t> first;
    std::vector<float> weight;

    // The window from `start` to `stop`, in pixels of an image of `inputs` pixels. Ends within a
    // millionth of a whole pixel are taken as whole. Does nothing when it has this setting already.
    void set(double start, double stop, std::uint32_t inputs, std::uint32_t outputs);

  private:
    double start_ = 0, stop_ = 0;
    std::uint32_t inputs_ = 0;
};

// One channel of one sample: takes the input rows from top to bottom, makes the output.
//     begin(...); for y in [down.low, down.high): write input row y to row(), then push();
//     finish();
class Resampler {
  public:
    // `out` holds height x width floats: down.outputs x across.outputs, or, transposed, the other
    // way round. orient: 4 transposes, then 2 flips up-down, then 1 flips left-right.
    void begin(const Axis& down, const Axis& across, unsigned orient, float* out);
    std::size_t space() const;
    // Where the next rows of across.high - across.low floats belong, `step` floats apart.
    float* rows(std::ptrdiff_t& step);
    void push(std::size_t count);
    void finish();

  private:
    void flush();
    float* plane_row(std::size_t i) { return plane_.data() + i * stride_; }

    static constexpr std::size_t block = 8;  // rows that are resampled across together
    const Axis* down_ = nullptr;
    const Axis* across_ = nullptr;
    bool transposes_ = false, flips_rows_ = false, flips_columns_ = false, straight_ = false;
    float* out_ = nullptr;       // where the upright image goes
    float* finished_ = nullptr;  // where the result goes
    std::size_t pushed_ = 0;     // rows so far
    std::size_t waiting_ = 0;    // of them in lines_
    std::size_t stride_ = 0, line_stride_ = 0;
    Buffer<float> lines_;    // [block][line_stride_]: input rows
    Buffer<float> turned_;   // [line_stride_][block]: the same, transposed
    Buffer<float> plane_;    // [rows][stride_]: resampled across
    Buffer<float> upright_;  // [down.outputs][across.outputs], when the output is transposed
};

}  // namespace bandcrop
