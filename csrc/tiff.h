// tiff: where the pixels of a TIFF file's first image lie. Reads no pixel.
//
// Promises
// - Trusts nothing in the file: every offset, count and product of sizes is checked against the
//   file's length or for overflow before it is used. Later images are looked at only behind an
//   image of one band, to count its pages, and only onwards in the file: no loop can be entered,
//   and the time is linear in the file's length.
// - Reads the first 4 KiB once; further reads only for what lies outside them.
// - Allocates at most the bytes of one tag's array, which lie inside the file.
// - Throws nothing but std::bad_alloc; failures are values that name the tag or byte offset.
// - No global state. Every function may run on many threads, each with its own Source and Header.
//
// Does not: decode, convert, know Python, or interpret anything but the first image's layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>

namespace bandcrop {

// The outcome of a step: fine, failed with a reason, or (File::cached_only) not in memory yet.
struct [[nodiscard]] Status {
    enum Code { fine, failed, not_cached };
    Code code = fine;
    std::string message;

    bool ok() const { return code == fine; }
    static Status failure(std::string why) { return {failed, std::move(why)}; }
};

// Reusable uninitialised memory, aligned for vectors. Contents are lost when it grows.
template <class T>
class Buffer {
  public:
    T* reserve(std::size_t count) {
        if (count > capacity_) {
            const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
            capacity_ = 0;
            memory_.reset();
            memory_.reset(static_cast<T*>(::operator new(bytes, std::align_val_t{64})));
            capacity_ = count;
        }
        return memory_.get();
    }
    T* data() { return memory_.get(); }

  private:
    struct Release {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<T, Release> memory_;
    std::size_t capacity_ = 0;
};

// Bytes that can be read at any offset.
class Source {
  public:
    virtual ~Source() = default;
    // Fills `to` with exactly `count` bytes from `offset`, or says why not.
    virtual Status read(std::uint64_t offset, void* to, std::size_t count) = 0;
    std::uint64_t size() const { return size_; }

  protected:
    std::uint64_t size_ = 0;
};

// A regular file, read with pread: never mapped, so a file that shrinks gives an error, not SIGBUS.
class File final : public Source {
  public:
    File() = default;
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() override;
    Status open(const char* path);  // once; a FIFO, folder or device is refused, not waited for
    Status read(std::uint64_t offset, void* to, std::size_t count) override;
    // Asks the kernel to read ahead.
    void will_need(std::uint64_t offset, std::uint64_t count) const;
    bool cached_only = false;  // read() answers not_cached instead of waiting for the disk

  private:
    int descriptor_ = -1;
};

// In the order of SampleFormat's numbers.
enum class Kind : std::uint8_t { unsigned_integer, signed_integer, floating };

enum class Compression : std::uint16_t {
    none = 1,
    lzw = 5,
    deflate = 8,
    packbits = 32773,
    zstd = 50000
};

// An array of unsigned integers in the file (strip or tile offsets, byte counts).
struct TagArray {
    std::uint16_t tag = 0;
    std::uint64_t offset = 0;  // of its first value in the file; the whole array lies in the file
    std::uint64_t count = 0;
    unsigned bytes = 0;  // of one value
};

struct Layout {
    std::uint32_t height = 0, width = 0;
    std::uint32_t bands = 0;
    Kind kind = Kind::unsigned_integer;
    unsigned sample_bytes = 0;  // 1, 2, 4 or 8
    bool separate = false;      // one plane for each band, instead of all bands of a pixel together
    Compression compression = Compression::none;
    unsigned predictor = 1;  // 1 none, 2 horizontal differences, 3 floating point
    bool tiled = false, big_tiff = false, big_endian = false;
    std::uint32_t chunk_height = 0, chunk_width = 0;  // of a strip or tile
    std::uint64_t chunks_across = 0, chunks_down = 0;
    TagArray offsets;
    TagArray counts;                      // may have no values where rows_tell_bytes()
    std::optional<std::uint64_t> nodata;  // the bits of such a sample; signed ones sign-extended
    std::optional<int> epsg;

    // Samples of a pixel in a chunk.
    unsigned pixel_samples() const { return separate ? 1 : bands; }
    std::uint64_t row_bytes() const {
        return std::uint64_t{chunk_width} * pixel_samples() * sample_bytes;
    }
    std::uint64_t chunk_bytes() const { return row_bytes() * chunk_height; }  // checked by parse
    // Whether a plane is one uncompressed strip or tile: writers of TIFF 4.0 and before left its
    // byte count out or 0, and it is worked out, as libtiff does.
    bool rows_tell_bytes() const {
        return compression == Compression::none && chunks_across * chunks_down == 1;
    }
};

// What has been read of a file's head; reused from file to file by its thread.
class Header {
  public:
    Status start(Source& source);
    // Points `bytes` at `count` bytes of the file from `offset`, valid until the next call.
    Status view(Source& source, std::uint64_t offset, std::uint64_t count,
                const std::uint8_t*& bytes);

  private:
    static constexpr std::size_t head_bytes = 4096;
    std::uint8_t head_[head_bytes];
    std::size_t held_ = 0;
    Buffer<std::uint8_t> elsewhere_;
};

// Fills `layout` from the first image of `source`. With `georeference`, looks for the EPSG code
// too.
Status parse(Source& source, Header& header, bool georeference, Layout& layout);

// Copies entries first .. first + count of an array that parse() has checked.
Status entries(Source& source, Header& header, const Layout& layout, const TagArray& array,
               std::uint64_t first, std::uint64_t count, std::uint64_t* to);

// The bits of a file's sample that GDAL takes for nodata by this text (tag 42113), if it holds one.
std::optional<std::uint64_t> nodata_sample(const std::string& text, const Layout& layout);

// Calls `run` with an unsigned integer of that many bytes.
template <class Run>
void with_word(unsigned bytes, Run&& run) {
    switch (bytes) {
        case 1: run(std::uint8_t{}); break;
        case 2: run(std::uint16_t{}); break;
        case 4: run(std::uint32_t{}); break;
        default: run(std::uint64_t{}); break;
    }
}

const char* compression_name(Compression compression);

}  // namespace bandcrop
