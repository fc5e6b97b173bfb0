// decode: bytes of strips and tiles -> samples of one band's rows.
//
// Promises
// - Touches only the strips and tiles that a region needs; of uncompressed ones only the rows, of
//   compressed ones the rows from their top to the last one needed, however large they are.
//   Neighbouring byte ranges are read in one call.
// - Bounds time and memory before they are spent: uncompressed bytes by the file's length, the
//   pixels of a region and the decompressed rows that it needs by 64 MiB, and more for files above
//   1 MiB, those of one strip or tile by what its codec can make of its bytes. Strips that overlap
//   to claim more than the file holds are refused. The time to plan is linear in the number of
//   strips and tiles.
// - Never reads or writes outside a buffer, whatever the bytes are; a strip that decodes to fewer
//   bytes than declared is an error, never stale pixels; an unknown length of a strip is worked out
//   from its rows or an error, never zeros.
// - Throws nothing but std::bad_alloc; no global state. A Region belongs to one thread and keeps
//   its memory from file to file.
//
// Does not: resample, know Python or threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "tiff.h"

// The libraries' own; their headers may be missing.
struct libdeflate_decompressor;
struct ZSTD_DCtx_s;

namespace bandcrop {

// How samples become floats: (x - mean) / std. Samples that are not finite or equal nodata become
// the mean, 0 after normalisation. `divide` rounds once, as float32 arithmetic would; without it x
// is multiplied by 1 / std, which differs in the last bit and is several times as fast.
struct Normalise {
    float mean = 0, std = 1;
    bool divide = false;
};

struct Rectangle {
    std::uint32_t top, bottom, left, right;  // rows top .. bottom - 1, columns left .. right - 1
};

// Decompressors and their state; made when first needed.
class Codec {
  public:
    // Fills `to` with the first `needed` bytes of what `from` becomes, `declared` ones if the file
    // is right. Fewer than `needed` are a failure, more do not matter. `to` has room for `slack`
    // more, which may be written too.
    Status decompress(Compression how, const std::uint8_t* from, std::size_t from_bytes,
                      std::uint8_t* to, std::size_t needed, std::uint64_t declared);
    static constexpr std::size_t slack = 65536;
    static std::vector<Compression> available();

  private:
    // Not unique_ptr, which would have to know here how they are freed.
    std::shared_ptr<libdeflate_decompressor> deflate_;
    std::shared_ptr<ZSTD_DCtx_s> zstd_;
};

// The pixels of a rectangle of some bands of one image, row by row.
class Region {
  public:
    // Finds what `area` (within the image) of `count` bands (each below layout.bands) is made of.
    Status plan(Source& source, Header& header, const Layout& layout, const Rectangle& area,
                const std::int64_t* bands, std::size_t count);
    // The byte ranges of the file that it is made of; neighbours are one.
    struct Range {
        std::uint64_t offset, length;
    };
    const std::vector<Range>& ranges() const { return ranges_; }
    // Reads them or, where a plane is one range, promises to: then the calls below read it in
    // pieces of a few megabytes, and `source` must live on.
    Status read(Source& source);

    // How many rows from `y` on the calls below can take at once: 1 at least. Ask before each call.
    std::uint32_t rows_at_hand(std::uint32_t y) const;
    // Rows y .. y + rows - 1 of the slot-th band of plan(), columns left .. right - 1, as floats;
    // `step` floats from row to row of `to`. Adds to `replaced`. Strips and tiles are decoded as
    // their rows come: ask for these rows of all slots before the next ones.
    Status floats(std::size_t slot, std::uint32_t y, std::uint32_t rows, const Normalise& how,
                  float* to, std::ptrdiff_t step, std::int64_t& replaced);
    // The same rows as they are, in the machine's byte order; `step` bytes from row to row.
    Status samples(std::size_t slot, std::uint32_t y, std::uint32_t rows, std::uint8_t* to,
                   std::size_t step);

  private:
    struct Chunk {                     // the part of a strip or tile that is needed
        std::uint64_t offset, length;  // in the file; both 0 for a chunk never written
        std::size_t at;                // of its first byte in raw_
        std::size_t needed;            // decompressed bytes to the last row needed
        std::size_t pixels_at;         // of its first decompressed byte in pixels_
    };
    Status plan_chunks(Source& source, Header& header);
    Status locate(const Source& source, std::uint64_t down, std::uint64_t offset,
                  std::uint64_t length, Chunk& chunk) const;
    Status fetch(std::size_t plane, std::uint32_t y);
    Status decompress(std::size_t plane, std::uint64_t down);
    const std::uint8_t* line(std::size_t slot, const std::uint8_t* row, std::size_t left,
                             std::size_t count);
    template <class Take>
    Status each_run(std::size_t slot, std::uint32_t y, std::uint32_t rows, Take&& take);

    Layout layout_;
    Rectangle area_{};
    std::vector<std::size_t> planes_;            // of each slot, in loaded_
    std::vector<std::uint32_t> sample_of_slot_;  // where in a pixel
    std::vector<std::int64_t> loaded_;           // the planes of the file that are loaded
    std::vector<std::size_t> loaded_at_;         // of each plane, in loaded_; or SIZE_MAX
    std::uint64_t first_across_ = 0, across_ = 0, first_down_ = 0, down_ = 0;
    std::vector<Chunk> chunks_;  // [plane][down][across]
    bool flat_ = false;          // each plane is one range of rows, read piece by piece
    std::uint32_t piece_ = 0;    // rows of a piece
    Source* source_ = nullptr;
    std::vector<Range> ranges_;
    // For each plane what is at hand: the row of chunks in pixels_ or, of a flat one, the first row
    // in raw_.
    std::vector<std::uint64_t> held_;
    std::vector<std::uint64_t> numbers_;
    Buffer<std::uint8_t> raw_, pixels_, line_, bytes_;
    Codec codec_;
};

// A vector of the lanes `Lane...` of a and b taken as one: what both compilers' builtins do.
template <int... Lane, class Vector>
[[gnu::always_inline]] inline Vector pick(Vector a, Vector b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Lane...);
#else
    typedef decltype(a == b) Mask;
    return __builtin_shuffle(a, b, Mask{Lane...});
#endif
}

// Whether this processor runs the kernels compiled for AVX2 and FMA beside the portable ones.
inline bool has_wide_vectors() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

}  // namespace bandcrop
