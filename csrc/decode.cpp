#include "decode.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(BANDCROP_LIBDEFLATE)
#include <libdeflate.h>
#elif defined(BANDCROP_ZLIB)
#include <zlib.h>
#endif
#if defined(BANDCROP_ZSTD)
#include <zstd.h>
#include <zstd_errors.h>
#endif

namespace bandcrop {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bandcrop runs on little-endian machines");

// Read at a time: whole tiles, as the kernel copies best in one piece, but never a whole scene.
constexpr std::size_t piece_bytes = std::size_t{4} << 20;
constexpr std::size_t largest_chunk = std::size_t{1} << 30;  // decompressed; more is refused

// The most bytes that one byte of compressed data can become.
std::uint64_t expansion(Compression how) {
    switch (how) {
        case Compression::packbits: return 64;
        case Compression::lzw: return 2731;  // 12 bits for a string of 4096
        case Compression::deflate: return 1032;
        case Compression::zstd: return 32768;  // a block of 128 KiB in 4 bytes
        case Compression::none: break;
    }
    return 1;
}

// The most bytes of pixels that are made of a file in one go. Half a second's work of the smallest
// file, and what DEFLATE can pack into a larger one.
double allowed(std::uint64_t file_bytes) {
    constexpr double small_file = 1 << 20;
    return (64 << 20) + 1032 * std::max(0.0, static_cast<double>(file_bytes) - small_file);
}

Status too_much(std::uint64_t file_bytes) {
    return Status::failure("claims more pixels than a file of " + std::to_string(file_bytes) +
                           " bytes should hold: read smaller windows of it");
}

Status too_short(const char* codec, std::size_t got, std::size_t needed) {
    return Status::failure(std::string(codec) + " data end after " + std::to_string(got) + " of " +
                           std::to_string(needed) + " bytes");
}

Status unpack_packbits(const std::uint8_t* from, std::size_t from_bytes, std::uint8_t* to,
                       std::size_t needed) {
    const std::uint8_t* end = from + from_bytes;
    std::size_t made = 0;
    while (made < needed && from != end) {
        const unsigned head = *from++;
        if (head == 128) continue;
        const std::size_t wanted = head < 128 ? head + 1 : 257 - head;
        const std::size_t count = std::min(wanted, needed - made);
        if (head < 128) {
            const auto left = static_cast<std::size_t>(end - from);
            if (left < count) return too_short("PackBits", made + left, needed);
            std::memcpy(to + made, from, count);
            from += std::min(wanted, left);
        } else {
            if (from == end) break;
            std::memset(to + made, *from++, count);
        }
        made += count;
    }
    return made < needed ? too_short("PackBits", made, needed) : Status{};
}

// TIFF's LZW: codes of 9 to 12 bits, most significant bit first, widened one code early. Every
// string of the table has been written before, as one that follows another: so the table keeps
// where.
Status unpack_lzw(const std::uint8_t* from, std::size_t from_bytes, std::uint8_t* to,
                  std::size_t needed) {
    constexpr unsigned clear = 256, finish = 257, table_size = 4096;
    struct String {  // in `to`, which largest_chunk keeps below 4 GiB
        std::uint32_t at, length;
    };
    String table[table_size];
    if (from_bytes >= 2 && from[0] == 0 && (from[1] & 1) != 0)
        return Status::failure("LZW data are of the old kind from before TIFF 6.0");

    std::size_t read = 0, made = 0;
    std::uint64_t bits = 0;
    unsigned held = 0, width = 9, next = 258;
    String last{0, 0};  // empty after a clear
    while (made < needed) {
        while (held < width && read < from_bytes) {
            if (from_bytes - read >= 4 && held <= 32) {
                std::uint32_t four;
                std::memcpy(&four, from + read, 4);
                bits = bits << 32 | __builtin_bswap32(four);
                read += 4;
                held += 32;
            } else {
                bits = bits << 8 | from[read++];
                held += 8;
            }
        }
        if (held < width) return too_short("LZW", made, needed);
        held -= width;
        const unsigned code = static_cast<unsigned>(bits >> held) & ((1u << width) - 1);
        if (code == finish) return too_short("LZW", made, needed);
        if (code == clear) {
            width = 9;
            next = 258;
            last.length = 0;
            continue;
        }
        String now{static_cast<std::uint32_t>(made), 1};
        if (code < 256) {
            to[made] = static_cast<std::uint8_t>(code);
        } else {
            // The string to come is the last one and the first byte of this one: those bytes stand
            // in the output one after the other, also when this string is the one to come.
            if (code > next || last.length == 0 || (code == next && next == table_size))
                return Status::failure("LZW code " + std::to_string(code) + " is not in the table");
            const String old = code < next ? table[code] : String{last.at, last.length + 1};
            now.length =
                static_cast<std::uint32_t>(std::min<std::size_t>(old.length, needed - made));
            std::uint8_t* out = to + made;
            const std::uint8_t* in = to + old.at;
            if (made - old.at >= 16 && needed - made >= now.length + 16) {
                for (std::size_t i = 0; i < now.length; i += 16) std::memcpy(out + i, in + i, 16);
            } else {
                for (std::size_t i = 0; i < now.length; ++i) out[i] = in[i];
            }
        }
        made += now.length;
        if (last.length != 0 && next < table_size) {
            table[next++] = {last.at, last.length + 1};
            if (next + 1 >= (1u << width) && width < 12) ++width;
        }
        last = now;
    }
    return {};
}

template <class T>
T load(const std::uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

// The loop that all pixels pass through. What is the same for all of a row is an argument or known
// to the compiler, so that it vectorises. `scale` divides or multiplies.
template <class T, bool divides, bool checks>
[[gnu::always_inline]] inline std::int64_t normalise(const std::uint8_t* __restrict from,
                                                     std::size_t stride, std::size_t n, float mean,
                                                     float scale, T none, float* __restrict to) {
    std::uint32_t bad = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const T sample = load<T>(from + i * stride);
        const auto x = static_cast<float>(sample);
        const float y = divides ? (x - mean) / scale : (x - mean) * scale;
        if constexpr (checks) {
            bool wrong = sample == none;
            if constexpr (std::is_floating_point_v<T>) wrong |= !(std::fabs(x) <= FLT_MAX);
            to[i] = wrong ? 0.0f : y;
            bad += wrong;
        } else {
            to[i] = y;
        }
    }
    return bad;
}

// Samples within a chunk: n in a row, `stride` bytes apart; rows `row_step` bytes apart.
struct Run {
    const std::uint8_t* from;
    std::size_t stride, n, row_step, rows;
};

// The bits of a nodata sample, as Layout has them.
using Nodata = std::optional<std::uint64_t>;

// A run of samples of type T to floats, rows `step` floats apart. Returns how many were replaced.
template <class T>
[[gnu::always_inline]] inline std::int64_t convert(const Run& run, const Normalise& how,
                                                   const Nodata& nodata, float* to,
                                                   std::ptrdiff_t step) {
    constexpr bool floating = std::is_floating_point_v<T>;
    T none{};
    if constexpr (floating) none = std::numeric_limits<T>::quiet_NaN();  // equals no sample
    if (nodata) std::memcpy(&none, &*nodata, sizeof none);
    std::int64_t bad = 0;
    const auto rows = [&](auto stride, auto divides, auto checks) __attribute__((always_inline)) {
        const float scale = divides ? how.std : 1 / how.std;
        for (std::size_t row = 0; row < run.rows; ++row)
            bad += normalise<T, divides, checks>(run.from + row * run.row_step, stride, run.n,
                                                 how.mean, scale, none,
                                                 to + static_cast<std::ptrdiff_t>(row) * step);
    };
    const auto strides = [&](auto divides, auto checks) __attribute__((always_inline)) {
        if (run.stride == sizeof(T))  // one band
            rows(std::integral_constant<std::size_t, sizeof(T)>{}, divides, checks);
        else if (run.stride == 2 * sizeof(T))  // two, as VV and VH
            rows(std::integral_constant<std::size_t, 2 * sizeof(T)>{}, divides, checks);
        else
            rows(run.stride, divides, checks);
    };
    const auto checks = [&](auto divides) __attribute__((always_inline)) {
        if (floating || nodata)
            strides(divides, std::true_type{});
        else
            strides(divides, std::false_type{});
    };
    if (how.divide)
        checks(std::true_type{});
    else
        checks(std::false_type{});
    return bad;
}

#if defined(__x86_64__)
template <class T>
[[gnu::target("avx2,fma")]] std::int64_t convert_wide(const Run& run, const Normalise& how,
                                                      const Nodata& nodata, float* to,
                                                      std::ptrdiff_t step) {
    return convert<T>(run, how, nodata, to, step);
}
#endif

using Convert = std::int64_t (*)(const Run&, const Normalise&, const Nodata&, float*,
                                 std::ptrdiff_t);

template <class T>
Convert converter() {
#if defined(__x86_64__)
    if (has_wide_vectors()) return convert_wide<T>;
#endif
    return convert<T>;
}

Convert converter(const Layout& layout) {
    const unsigned bytes = layout.sample_bytes;
    switch (layout.kind) {
        case Kind::floating: return bytes == 4 ? converter<float>() : converter<double>();
        case Kind::signed_integer:
            return bytes == 1   ? converter<std::int8_t>()
                   : bytes == 2 ? converter<std::int16_t>()
                   : bytes == 4 ? converter<std::int32_t>()
                                : converter<std::int64_t>();
        case Kind::unsigned_integer: break;
    }
    return bytes == 1   ? converter<std::uint8_t>()
           : bytes == 2 ? converter<std::uint16_t>()
           : bytes == 4 ? converter<std::uint32_t>()
                        : converter<std::uint64_t>();
}

template <class Word>
void gather(const std::uint8_t* __restrict from, std::size_t stride, std::size_t n,
            std::uint8_t* __restrict to) {
    const auto run = [&](auto step) {
        for (std::size_t i = 0; i < n; ++i)
            std::memcpy(to + i * sizeof(Word), from + i * step, sizeof(Word));
    };
    if (stride == sizeof(Word))
        std::memcpy(to, from, n * sizeof(Word));
    else if (stride == 2 * sizeof(Word))  // two bands, as VV and VH: vectorises
        run(std::integral_constant<std::size_t, 2 * sizeof(Word)>{});
    else
        run(stride);
}

template <class Word>
Word swapped(Word word) {
    if constexpr (sizeof(Word) == 1) return word;
    if constexpr (sizeof(Word) == 2) return __builtin_bswap16(word);
    if constexpr (sizeof(Word) == 4) return __builtin_bswap32(word);
    if constexpr (sizeof(Word) == 8) return __builtin_bswap64(word);
}

// Running sums of n bytes, modulo 256: sixteen at a time in four shifted additions.
void accumulate_bytes(std::uint8_t* bytes, std::size_t n) {
    typedef std::uint8_t Vector __attribute__((vector_size(16)));
    const Vector zero{};
    Vector carry{};
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        Vector v;
        std::memcpy(&v, bytes + i, 16);
        v += pick<0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30>(zero, v);
        v += pick<0, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29>(zero, v);
        v += pick<0, 0, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27>(zero, v);
        v += pick<0, 0, 0, 0, 0, 0, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23>(zero, v);
        v += carry;
        carry = pick<15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15>(v, v);
        std::memcpy(bytes + i, &v, 16);
    }
    for (std::uint8_t sum = carry[0]; i < n; ++i)
        bytes[i] = sum = static_cast<std::uint8_t>(sum + bytes[i]);
}

}  // namespace

std::vector<Compression> Codec::available() {
    std::vector<Compression> list = {Compression::none, Compression::packbits, Compression::lzw};
#if defined(BANDCROP_LIBDEFLATE) || defined(BANDCROP_ZLIB)
    list.push_back(Compression::deflate);
#endif
#if defined(BANDCROP_ZSTD)
    list.push_back(Compression::zstd);
#endif
    return list;
}

Status Codec::decompress(Compression how, const std::uint8_t* from, std::size_t from_bytes,
                         std::uint8_t* to, std::size_t needed,
                         [[maybe_unused]] std::uint64_t declared) {
    [[maybe_unused]] const std::size_t room = needed + slack;
    switch (how) {
        case Compression::none: break;
        case Compression::packbits: return unpack_packbits(from, from_bytes, to, needed);
        case Compression::lzw: return unpack_lzw(from, from_bytes, to, needed);
        case Compression::deflate: {
#if defined(BANDCROP_LIBDEFLATE)
            if (!deflate_)
                deflate_.reset(libdeflate_alloc_decompressor(), libdeflate_free_decompressor);
            if (!deflate_) throw std::bad_alloc();
            std::size_t made = 0;
            const libdeflate_result result =
                libdeflate_zlib_decompress(deflate_.get(), from, from_bytes, to, room, &made);
            // There is more, of no interest. What did not fit is at most a stored block, shorter
            // than the slack: the bytes needed are there (libtiff relies on it too).
            if (result == LIBDEFLATE_INSUFFICIENT_SPACE) return {};
            if (result != LIBDEFLATE_SUCCESS) return Status::failure("DEFLATE data are damaged");
            return made < needed ? too_short("DEFLATE", made, needed) : Status{};
#elif defined(BANDCROP_ZLIB)
            z_stream stream{};
            if (inflateInit(&stream) != Z_OK) throw std::bad_alloc();
            stream.next_in = const_cast<std::uint8_t*>(from);
            stream.next_out = to;
            std::size_t in = from_bytes, out = room;  // zlib counts in 32 bits
            int result = Z_OK;
            while (result == Z_OK && out > 0) {
                stream.avail_in = static_cast<uInt>(std::min<std::size_t>(in, UINT32_MAX));
                stream.avail_out = static_cast<uInt>(std::min<std::size_t>(out, UINT32_MAX));
                const uInt in_before = stream.avail_in, out_before = stream.avail_out;
                result = inflate(&stream, Z_NO_FLUSH);
                in -= in_before - stream.avail_in;
                out -= out_before - stream.avail_out;
            }
            inflateEnd(&stream);
            // Z_OK: there is more, of no interest. The checksum stands at the stream's end.
            if (result != Z_OK && result != Z_STREAM_END)
                return Status::failure("DEFLATE data are damaged");
            return out > slack ? too_short("DEFLATE", room - out, needed) : Status{};
#else
            return Status::failure(
                "is DEFLATE-compressed, which this build of bandcrop cannot read: "
                "install libdeflate-dev, then build again");
#endif
        }
        case Compression::zstd: {
#if defined(BANDCROP_ZSTD)
            if (!zstd_) zstd_.reset(ZSTD_createDCtx(), ZSTD_freeDCtx);
            if (!zstd_) throw std::bad_alloc();
            ZSTD_DCtx* const context = zstd_.get();
            std::size_t made = 0;
            bool more = declared > room;
            if (!more) {
                made = ZSTD_decompressDCtx(context, to, room, from, from_bytes);
                more = ZSTD_getErrorCode(made) == ZSTD_error_dstSize_tooSmall;
            }
            if (more) {
                // A stream can be left before its end, at the cost of a buffer of its own.
                ZSTD_inBuffer in{from, from_bytes, 0};
                ZSTD_outBuffer out{to, needed, 0};
                made = ZSTD_initDStream(context);
                while (!ZSTD_isError(made) && out.pos < needed && in.pos < from_bytes)
                    made = ZSTD_decompressStream(context, &out, &in);
                if (!ZSTD_isError(made)) made = out.pos;
            }
            if (ZSTD_isError(made))
                return Status::failure(std::string("ZSTD data are damaged: ") +
                                       ZSTD_getErrorName(made));
            return made < needed ? too_short("ZSTD", made, needed) : Status{};
#else
            return Status::failure(
                "is ZSTD-compressed, which this build of bandcrop cannot read: "
                "install libzstd-dev, then build again");
#endif
        }
    }
    return Status::failure("is not compressed");
}

// Where the needed part of one chunk lies, checked against the file.
Status Region::locate(const Source& source, std::uint64_t down, std::uint64_t offset,
                      std::uint64_t length, Chunk& chunk) const {
    const std::uint64_t chunk_top = down * layout_.chunk_height, row_bytes = layout_.row_bytes();
    const std::uint64_t skip = std::max<std::uint64_t>(area_.top, chunk_top) - chunk_top;
    const std::uint64_t rows =
        std::min<std::uint64_t>(area_.bottom - chunk_top, layout_.chunk_height);
    const auto bad = [&](const TagArray& array, const std::string& what) {
        return Status::failure("tag " + std::to_string(array.tag) +
                               (layout_.tiled ? " (tile" : " (strip") + " at byte " +
                               std::to_string(offset) + ") " + what);
    };
    if (length == 0) {
        if (offset == 0 && layout_.counts.count != 0) return {};  // never written
        if (!layout_.rows_tell_bytes()) return bad(layout_.counts, "says that it has 0 bytes");
        length = rows * row_bytes;
    }
    if (offset < 8) return bad(layout_.offsets, "overlaps the file's header");
    if (offset > source.size() || length > source.size() - offset) {
        // An uncompressed last strip may claim rows past the image; only what is needed must be
        // there.
        if (layout_.compression != Compression::none || offset > source.size() ||
            rows * row_bytes > source.size() - offset)
            return bad(layout_.offsets, "reaches past the end of the file, byte " +
                                            std::to_string(source.size()) + ": it is truncated");
    }
    if (layout_.compression == Compression::none) {
        if (length < rows * row_bytes)
            return bad(layout_.counts, "holds " + std::to_string(length) +
                                           " bytes, its rows need " +
                                           std::to_string(rows * row_bytes));
        chunk.offset = offset + skip * row_bytes;
        chunk.length = (rows - skip) * row_bytes;
        return {};
    }
    chunk.offset = offset;
    chunk.length = length;
    const std::uint64_t most =
        std::min<std::uint64_t>(largest_chunk, length * expansion(layout_.compression) + 64);
    if (rows * row_bytes > most)
        return bad(layout_.counts, "declares " + std::to_string(rows * row_bytes) + " bytes from " +
                                       std::to_string(length) + " compressed ones");
    chunk.needed = static_cast<std::size_t>(rows * row_bytes);
    return {};
}

Status Region::plan_chunks(Source& source, Header& header) {
    first_down_ = area_.top / layout_.chunk_height;
    first_across_ = area_.left / layout_.chunk_width;
    down_ = (area_.bottom - 1) / layout_.chunk_height - first_down_ + 1;
    across_ = (area_.right - 1) / layout_.chunk_width - first_across_ + 1;
    chunks_.clear();
    ranges_.clear();
    flat_ = across_ == 1 && layout_.compression == Compression::none;
    std::uint64_t raw_bytes = 0, pixels_bytes = 0, decoded = 0;
    // Entries of neighbouring chunks are fetched together: of strips all, of tiles a row of them.
    const bool whole_rows = across_ == layout_.chunks_across;
    const std::uint64_t runs = whole_rows ? 1 : down_, run = across_ * (whole_rows ? down_ : 1);
    numbers_.resize(static_cast<std::size_t>(2 * run));
    std::uint64_t* const offsets = numbers_.data();
    std::uint64_t* const lengths = offsets + run;
    for (const std::int64_t plane : loaded_) {
        std::uint64_t most_pixels = 0, end = 0;
        for (std::uint64_t r = 0; r < runs; ++r) {
            const std::uint64_t first =
                (static_cast<std::uint64_t>(plane) * layout_.chunks_down + first_down_ + r) *
                    layout_.chunks_across +
                first_across_;
            if (Status status =
                    entries(source, header, layout_, layout_.offsets, first, run, offsets);
                !status.ok())
                return status;
            std::fill_n(lengths, run, 0);
            if (layout_.counts.count != 0)
                if (Status status =
                        entries(source, header, layout_, layout_.counts, first, run, lengths);
                    !status.ok())
                    return status;
            std::uint64_t row_pixels = 0, down = first_down_ + r, across = 0;
            for (std::uint64_t i = 0; i < run; ++i, ++across) {
                if (across == across_) {  // the next row of chunks
                    row_pixels = across = 0;
                    ++down;
                }
                Chunk& chunk = chunks_.emplace_back();
                if (Status status = locate(source, down, offsets[i], lengths[i], chunk);
                    !status.ok())
                    return status;
                chunk.at = static_cast<std::size_t>(raw_bytes);
                raw_bytes += chunk.length;
                if (raw_bytes > source.size())
                    return Status::failure("tag " + std::to_string(layout_.offsets.tag) +
                                           ": its strips or tiles overlap, together they hold more "
                                           "than the file");
                chunk.pixels_at = static_cast<std::size_t>(pixels_bytes + row_pixels);
                row_pixels += chunk.needed;
                decoded += chunk.needed;
                if (static_cast<double>(decoded) > allowed(source.size()))
                    return too_much(source.size());
                most_pixels = std::max(most_pixels, row_pixels);
                if (r + i > 0) flat_ = flat_ && chunk.offset == end;
                end = chunk.offset + chunk.length;
                if (chunk.length == 0) {
                    flat_ = false;
                    continue;
                }
                if (!ranges_.empty() &&
                    ranges_.back().offset + ranges_.back().length == chunk.offset)
                    ranges_.back().length += chunk.length;
                else
                    ranges_.push_back({chunk.offset, chunk.length});
            }
        }
        pixels_bytes += most_pixels + Codec::slack;
    }
    if (flat_) {
        const std::uint64_t row_bytes = layout_.row_bytes();
        piece_ = static_cast<std::uint32_t>(
            std::clamp<std::uint64_t>(piece_bytes / row_bytes, 1, area_.bottom - area_.top));
        raw_bytes = loaded_.size() * piece_ * row_bytes;
    }
    raw_.reserve(static_cast<std::size_t>(raw_bytes));
    pixels_.reserve(static_cast<std::size_t>(pixels_bytes));
    return {};
}

Status Region::plan(Source& source, Header& header, const Layout& layout, const Rectangle& area,
                    const std::int64_t* bands, std::size_t count) {
    layout_ = layout;
    area_ = area;
    // Strips never written cost the file nothing, and a row of each strip or tile takes its time.
    const double rows = area.bottom - area.top;
    const double row_bytes = double(area.right - area.left) * layout.sample_bytes;
    const double across =
        (area.right - 1) / layout.chunk_width - area.left / layout.chunk_width + 1;
    if (static_cast<double>(count) * rows * (row_bytes + 32 * across) > allowed(source.size()))
        return too_much(source.size());
    planes_.clear();
    sample_of_slot_.clear();
    loaded_.clear();
    loaded_at_.assign(layout.separate ? layout.bands : 1, SIZE_MAX);
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t plane = layout.separate ? bands[i] : 0;
        std::size_t& at = loaded_at_[static_cast<std::size_t>(plane)];
        if (at == SIZE_MAX) {
            at = loaded_.size();
            loaded_.push_back(plane);
        }
        planes_.push_back(at);
        sample_of_slot_.push_back(layout.separate ? 0 : static_cast<std::uint32_t>(bands[i]));
    }
    held_.assign(loaded_.size(), UINT64_MAX);
    return plan_chunks(source, header);
}

Status Region::read(Source& source) {
    source_ = &source;
    if (flat_) return {};
    std::uint8_t* to = raw_.data();
    for (const Range& range : ranges_) {
        if (Status status = source.read(range.offset, to, static_cast<std::size_t>(range.length));
            !status.ok())
            return status;
        to += range.length;
    }
    return {};
}

// Reads the piece of a flat plane that begins with row `y`, unless row `y` is in the one at hand.
Status Region::fetch(std::size_t plane, std::uint32_t y) {
    std::uint64_t& held = held_[plane];
    if (held <= y && y < held + piece_) return {};
    const auto row_bytes = static_cast<std::size_t>(layout_.row_bytes());
    const std::uint32_t rows = std::min(piece_, area_.bottom - y);
    held = UINT64_MAX;
    if (Status status =
            source_->read(chunks_[plane * down_].offset + std::uint64_t{y - area_.top} * row_bytes,
                          raw_.data() + plane * piece_ * row_bytes, rows * row_bytes);
        !status.ok())
        return status;
    held = y;
    return {};
}

Status Region::decompress(std::size_t plane, std::uint64_t down) {
    if (layout_.compression == Compression::none || held_[plane] == down) return {};
    for (std::uint64_t i = 0; i < across_; ++i) {
        const Chunk& chunk = chunks_[(plane * down_ + down - first_down_) * across_ + i];
        if (chunk.length == 0) continue;
        if (Status status = codec_.decompress(
                layout_.compression, raw_.data() + chunk.at, static_cast<std::size_t>(chunk.length),
                pixels_.data() + chunk.pixels_at, chunk.needed, layout_.chunk_bytes());
            !status.ok())
            return Status::failure(std::string(layout_.tiled ? "tile" : "strip") + " at byte " +
                                   std::to_string(chunk.offset) + ": " + status.message);
    }
    held_[plane] = down;
    return {};
}

// `count` samples of a chunk's row from column `left` on, with predictor and byte order undone.
const std::uint8_t* Region::line(std::size_t slot, const std::uint8_t* row, std::size_t left,
                                 std::size_t count) {
    const unsigned size = layout_.sample_bytes, pixel = layout_.pixel_samples();
    const std::uint32_t sample = sample_of_slot_[slot];
    if (layout_.predictor == 3) {
        // Bytes of the row's samples, most significant ones first, as differences to the byte one
        // pixel before: every `pixel`-th byte belongs to this band.
        const std::size_t width = layout_.chunk_width;
        std::uint8_t* bytes = bytes_.reserve(width * size);
        gather<std::uint8_t>(row + sample, pixel, width * size, bytes);
        accumulate_bytes(bytes, width * size);
        std::uint8_t* to = line_.reserve(count * size);
        with_word(size, [&](auto word) {
            for (std::size_t i = 0; i < count; ++i) {
                word = 0;
                for (std::size_t b = 0; b < sizeof(word); ++b)
                    word = static_cast<decltype(word)>(word << 8 | bytes[b * width + left + i]);
                std::memcpy(to + i * sizeof(word), &word, sizeof(word));
            }
        });
        return to;
    }
    // Differences add up from the chunk's first column.
    const std::size_t first = layout_.predictor == 2 ? 0 : left;
    const std::size_t lead = left - first, n = lead + count;
    std::uint8_t* to = line_.reserve(n * size);
    with_word(size, [&](auto word) {
        using Word = decltype(word);
        gather<Word>(row + (first * pixel + sample) * size, std::size_t{pixel} * size, n, to);
        if (layout_.big_endian)
            for (std::size_t i = 0; i < n; ++i) {
                const Word value = swapped(load<Word>(to + i * sizeof(Word)));
                std::memcpy(to + i * sizeof(Word), &value, sizeof(Word));
            }
        if (layout_.predictor == 2) {
            Word sum = 0;
            for (std::size_t i = 0; i < n; ++i) {
                sum = static_cast<Word>(sum + load<Word>(to + i * sizeof(Word)));
                std::memcpy(to + i * sizeof(Word), &sum, sizeof(Word));
            }
        }
    });
    return to + lead * size;
}

std::uint32_t Region::rows_at_hand(std::uint32_t y) const {
    if (flat_) {
        const bool held = held_[0] <= y && y < held_[0] + piece_;
        const std::uint64_t end = (held ? held_[0] : y) + piece_;
        return static_cast<std::uint32_t>(std::min<std::uint64_t>(end, area_.bottom)) - y;
    }
    return std::min(area_.bottom - y, layout_.chunk_height - y % layout_.chunk_height);
}

// Hands the wanted samples to take(run, first column, first row), chunk by chunk. A chunk never
// written is nodata or, without such a value, 0.
template <class Take>
Status Region::each_run(std::size_t slot, std::uint32_t y, std::uint32_t rows, Take&& take) {
    const std::uint64_t down = y / layout_.chunk_height, chunk_top = down * layout_.chunk_height;
    const auto row_bytes = static_cast<std::size_t>(layout_.row_bytes());
    const std::size_t plane = planes_[slot];
    const std::size_t size = layout_.sample_bytes, pixel = layout_.pixel_samples() * size;
    if (Status status = flat_ ? fetch(plane, y) : decompress(plane, down); !status.ok())
        return status;
    const std::uint64_t absent = layout_.nodata.value_or(0);
    const bool as_they_are = layout_.predictor == 1 && (!layout_.big_endian || size == 1);
    std::size_t column = 0;
    for (std::uint64_t i = 0; i < across_; ++i) {
        const Chunk& chunk = chunks_[(plane * down_ + down - first_down_) * across_ + i];
        const std::uint64_t edge = (first_across_ + i) * layout_.chunk_width;
        const std::uint64_t end = std::min<std::uint64_t>(area_.right - edge, layout_.chunk_width);
        const auto left =
            static_cast<std::size_t>(std::max<std::uint64_t>(area_.left, edge) - edge);
        const auto count = static_cast<std::size_t>(end) - left;
        const std::size_t from = column;
        column += count;
        if (chunk.length == 0) {
            take(Run{reinterpret_cast<const std::uint8_t*>(&absent), 0, count, 0, rows}, from, 0);
            continue;
        }
        const std::uint8_t* row;  // of the chunk
        if (flat_)
            row = raw_.data() + (plane * piece_ + y - held_[plane]) * row_bytes;
        else if (layout_.compression == Compression::none)
            row = raw_.data() + chunk.at +
                  (y - std::max<std::uint64_t>(area_.top, chunk_top)) * row_bytes;
        else
            row = pixels_.data() + chunk.pixels_at + (y - chunk_top) * row_bytes;
        if (as_they_are) {
            row += left * pixel + sample_of_slot_[slot] * size;
            take(Run{row, pixel, count, row_bytes, rows}, from, 0);
            continue;
        }
        for (std::uint32_t r = 0; r < rows; ++r, row += row_bytes)
            take(Run{line(slot, row, left, count), size, count, 0, 1}, from, r);
    }
    return {};
}

Status Region::floats(std::size_t slot, std::uint32_t y, std::uint32_t rows, const Normalise& how,
                      float* to, std::ptrdiff_t step, std::int64_t& replaced) {
    const Convert convert = converter(layout_);
    return each_run(slot, y, rows, [&](const Run& run, std::size_t column, std::uint32_t row) {
        replaced += convert(run, how, layout_.nodata,
                            to + row * step + static_cast<std::ptrdiff_t>(column), step);
    });
}

Status Region::samples(std::size_t slot, std::uint32_t y, std::uint32_t rows, std::uint8_t* to,
                       std::size_t step) {
    const std::size_t size = layout_.sample_bytes;
    return each_run(slot, y, rows, [&](const Run& run, std::size_t column, std::uint32_t row) {
        with_word(layout_.sample_bytes, [&](auto word) {
            for (std::size_t r = 0; r < run.rows; ++r)
                gather<decltype(word)>(run.from + r * run.row_step, run.stride, run.n,
                                       to + (row + r) * step + column * size);
        });
    });
}

}  // namespace bandcrop
