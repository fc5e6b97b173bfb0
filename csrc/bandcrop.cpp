// bandcrop: the Python surface. Checks arguments, releases the GIL, turns failures into exceptions.
//
// Promises: `out` is written only between the call and the end of fill() or wait(), or the Ticket's
// destruction; Ctrl-C is noticed within a tenth of a second or one sample; a Reader used in a
// process forked after it was made raises RuntimeError. Threads that wait here when Python ends
// stop; a sub-interpreter gets an ImportError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace py = pybind11;
using namespace py::literals;

namespace bandcrop {
namespace {

constexpr std::chrono::milliseconds between_signals{50};

// A scope without the GIL. Where Python has ended meanwhile, taking it back ends a daemon thread
// (before 3.14, by an unwinding that would meet destructors that need the GIL): it stops here
// instead, until the process is gone.
class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;
    ~WithoutGil() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) ::pause();
        }
    }

  private:
    PyThreadState* state_;
};

// Messages hold paths, which need not be UTF-8: as os.fsdecode() has it.
py::str text(const std::string& message) {
    PyObject* decoded =
        PyUnicode_DecodeFSDefaultAndSize(message.data(), static_cast<Py_ssize_t>(message.size()));
    if (decoded == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(decoded);
}

[[noreturn]] void raise_tile_error(const std::string& message, py::object index) {
    py::object error = py::module_::import("bandcrop._core").attr("TileError")(text(message));
    error.attr("index") = std::move(index);
    PyErr_SetObject(py::type::of(error).ptr(), error.ptr());
    throw py::error_already_set();
}

// Where a message holds a path: pybind11 decodes those of its own exceptions as UTF-8.
[[noreturn]] void raise_error(const py::handle& type, const std::string& message) {
    py::set_error(type, text(message));
    throw py::error_already_set();
}

// A path as the file system has it: str, bytes or os.PathLike.
std::string path_bytes(py::handle path) {
    PyObject* bytes = nullptr;
    if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
    return std::string(py::reinterpret_steal<py::bytes>(bytes));
}

std::string type_name(const Layout& layout) {
    constexpr const char* kinds[] = {"uint", "int", "float"};
    return kinds[static_cast<unsigned>(layout.kind)] + std::to_string(8 * layout.sample_bytes);
}

// As samples of the file compare with it: an int or a float.
py::object nodata(const Layout& layout) {
    if (!layout.nodata) return py::none();
    const std::uint64_t bits = *layout.nodata;
    const auto floating = [&](auto value) {
        std::memcpy(&value, &bits, sizeof value);
        return py::float_(value);
    };
    switch (layout.kind) {
        case Kind::floating: return layout.sample_bytes == 4 ? floating(0.0f) : floating(0.0);
        case Kind::signed_integer: return py::int_(static_cast<std::int64_t>(bits));
        case Kind::unsigned_integer: break;
    }
    return py::int_(bits);
}

// A value for nodata as text, like the tag that it stands for, and whole numbers by their digits:
// "1e+16" as an int64 is 1.
std::string nodata_text(const py::object& value) {
    py::object number = py::float_(value);
    if (number.attr("is_integer")().cast<bool>()) number = py::int_(value);
    return py::str(number).cast<std::string>();
}

Layout read_info(const py::object& path, const py::object& nodata) {
    const std::string name = path_bytes(path);
    Layout layout;
    Status status;
    {
        const WithoutGil released;
        File file;
        Header header;
        status = file.open(name.c_str());
        if (status.ok()) status = parse(file, header, true, layout);
    }
    if (!status.ok()) raise_tile_error(name + ": " + status.message, py::none());
    if (!layout.nodata && !nodata.is_none())
        layout.nodata = nodata_sample(nodata_text(nodata), layout);
    return layout;
}

using Numbers = std::optional<std::vector<std::int64_t>>;

py::array read_samples(const py::object& path, const Numbers& bands, const Numbers& window) {
    const std::string name = path_bytes(path);
    const auto check = [&](const Status& status) {
        if (!status.ok()) raise_tile_error(name + ": " + status.message, py::none());
    };
    File file;
    Header header;
    Layout layout;
    Status status;
    {
        const WithoutGil released;
        status = file.open(name.c_str());
        if (status.ok()) status = parse(file, header, false, layout);
    }
    check(status);

    std::vector<std::int64_t> wanted;
    if (bands)
        wanted = *bands;
    else
        for (std::uint32_t b = 0; b < layout.bands; ++b) wanted.push_back(b);
    for (const std::int64_t band : wanted)
        if (band < 0 || band >= layout.bands)
            raise_error(PyExc_IndexError, name + " has " + std::to_string(layout.bands) +
                                              " bands, band " + std::to_string(band) +
                                              " was asked for (0-based)");
    if (wanted.empty()) throw py::value_error("bands is empty");
    Rectangle area{0, layout.height, 0, layout.width};
    if (window) {
        const auto& w = *window;
        if (w.size() != 4) throw py::value_error("window needs top, left, height, width");
        if (w[0] < 0 || w[1] < 0 || w[2] < 1 || w[3] < 1 || w[0] > layout.height - w[2] ||
            w[1] > layout.width - w[3])
            raise_error(PyExc_ValueError, name + " has " + std::to_string(layout.height) + " x " +
                                              std::to_string(layout.width) +
                                              " pixels, the window reaches outside them");
        area = {static_cast<std::uint32_t>(w[0]), static_cast<std::uint32_t>(w[0] + w[2]),
                static_cast<std::uint32_t>(w[1]), static_cast<std::uint32_t>(w[1] + w[3])};
    }

    Region region;
    {
        const WithoutGil released;
        status = region.plan(file, header, layout, area, wanted.data(), wanted.size());
        if (status.ok()) status = region.read(file);
    }
    check(status);
    const std::size_t height = area.bottom - area.top, width = area.right - area.left;
    py::array out(py::dtype(type_name(layout)), {wanted.size(), height, width});
    auto* to = static_cast<std::uint8_t*>(out.mutable_data());
    {
        const WithoutGil released;
        const std::size_t row = width * layout.sample_bytes;
        for (std::uint32_t y = area.top, rows = 0; y < area.bottom && status.ok(); y += rows) {
            rows = region.rows_at_hand(y);
            for (std::size_t b = 0; b < wanted.size() && status.ok(); ++b)
                status = region.samples(b, y, rows, to + (b * height + y - area.top) * row, row);
        }
    }
    check(status);
    return out;
}

struct Report {
    py::array_t<std::int64_t> replaced;
    py::list errors;
    std::uint64_t bytes_read;
};

using SharedPool = std::shared_ptr<Pool>;

// In a forked child the threads are gone and the mutex may be held for ever: keep hands off.
void check_process(pid_t made_in) {
    if (getpid() != made_in)
        throw std::runtime_error(
            "this Reader was made before the process was forked: make a new one in the child");
}

py::object report(const Batch& batch) {
    py::list errors;
    for (std::size_t i = 0; i < batch.errors.size(); ++i) {
        const auto& [message, path] = batch.errors[i];
        if (message.empty()) continue;
        const std::string full = batch.request.paths[path] + ": " + message;
        if (batch.request.stop_at_failure) raise_tile_error(full, py::int_(i));
        errors.append(py::make_tuple(i, text(full)));
    }
    return py::cast(
        Report{py::array_t<std::int64_t>(static_cast<py::ssize_t>(batch.replaced.size()),
                                         batch.replaced.data()),
               errors, batch.bytes_read});
}

// Runs `step` (which says whether the batch is done) without the GIL until it is, and looks for
// signals in between.
template <class Step>
void until_done(Pool& pool, Batch& batch, Step&& step) {
    for (;;) {
        bool done;
        {
            const WithoutGil released;
            done = step();
        }
        if (done) return;
        if (PyErr_CheckSignals() != 0) {
            const WithoutGil released;
            pool.cancel(batch);
            break;
        }
    }
    throw py::error_already_set();
}

class Ticket {
  public:
    Ticket(SharedPool pool, std::shared_ptr<Batch> batch, py::object out)
        : pool_(std::move(pool)), batch_(std::move(batch)), out_(std::move(out)) {}
    Ticket(Ticket&&) = default;
    ~Ticket() {
        if (!pool_ || getpid() != made_in_) return;
        const WithoutGil released;
        pool_->cancel(*batch_);
    }
    py::object wait() {
        check_process(made_in_);
        if (cancelled_) throw std::runtime_error("this batch was cancelled by a signal");
        try {
            until_done(*pool_, *batch_, [&] { return pool_->wait(*batch_, between_signals); });
        } catch (...) {
            cancelled_ = true;
            throw;
        }
        return report(*batch_);
    }

  private:
    SharedPool pool_;
    std::shared_ptr<Batch> batch_;
    py::object out_;  // keeps the memory that is written
    bool cancelled_ = false;
    pid_t made_in_ = getpid();
};

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

std::string shape_of(const py::array& array) {
    std::string text = "[";
    for (py::ssize_t i = 0; i < array.ndim(); ++i)
        text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

template <class T>
std::vector<T> values(const Array<T>& array) {
    return std::vector<T>(array.data(), array.data() + array.size());
}

py::array output_array(const py::object& out) {
    // A torch tensor lends its memory through numpy(); one that cannot says so itself.
    const py::object array =
        py::isinstance<py::array>(out) || !py::hasattr(out, "numpy") ? out : out.attr("numpy")();
    if (!py::isinstance<py::array>(array))
        throw py::type_error("out must be a numpy array or a CPU tensor");
    auto result = py::reinterpret_borrow<py::array>(array);
    if (!py::isinstance<py::array_t<float>>(result) || result.ndim() != 4 ||
        !result.attr("flags").attr("carray").cast<bool>())
        throw py::type_error(
            "out must be float32, aligned, writeable and C-contiguous [N, C, H, W], not " +
            py::str(result.dtype()).cast<std::string>() + " " + shape_of(result));
    for (int i = 1; i < 4; ++i)
        if (result.shape(i) < 1 || result.shape(i) > 65536)
            throw py::value_error("out has the shape " + shape_of(result));
    return result;
}

// `kinds` are the dtype kinds that will do, e.g. "iu" for integers: a float band would be rounded
// unseen.
py::array checked(const py::object& given, const char* name, const char* kinds) {
    py::array array = py::module_::import("numpy").attr("asarray")(given);
    if (std::strchr(kinds, array.dtype().kind()) == nullptr)
        throw py::type_error(std::string(name) + " has the dtype " +
                             py::str(array.dtype()).cast<std::string>());
    return array;
}

std::vector<float> statistics(const py::object& given, const char* name, Request& request) {
    if (given.is_none()) return {};
    const Array<float> array(checked(given, name, "fiu"));
    const bool by_band = array.ndim() == 1;
    const auto n = static_cast<py::ssize_t>(request.samples);
    const auto c = static_cast<py::ssize_t>(request.channels);
    if (!by_band && !(array.ndim() == 2 && array.shape(0) == n && array.shape(1) == c))
        throw py::value_error(std::string(name) + " has the shape " + shape_of(array) +
                              ": it needs one value for each band of the files, or [N, C]");
    if (by_band)
        for (const std::int64_t band : request.bands)
            if (band >= array.shape(0))
                throw py::value_error(std::string(name) + " has " + std::to_string(array.shape(0)) +
                                      " values, none for band " + std::to_string(band));
    const bool is_std = std::strcmp(name, "std") == 0;
    for (py::ssize_t i = 0; i < array.size(); ++i)
        if (!std::isfinite(array.data()[i]) || (is_std && array.data()[i] < FLT_MIN))
            throw py::value_error(std::string(name) + " holds " + std::to_string(array.data()[i]));
    request.statistics_by_band = by_band;
    return values(array);
}

Request checked_request(const py::array& out, const py::sequence& paths, const py::object& bands,
                        const py::object& windows, const py::object& orient, const py::object& mean,
                        const py::object& std, const std::string& bad,
                        const py::object& bands_in_file, const py::object& nodata) {
    Request request;
    request.out = static_cast<float*>(py::array(out).mutable_data());
    request.samples = static_cast<std::size_t>(out.shape(0));
    request.channels = static_cast<std::size_t>(out.shape(1));
    request.height = static_cast<std::size_t>(out.shape(2));
    request.width = static_cast<std::size_t>(out.shape(3));
    if (bad != "raise" && bad != "report")
        throw py::value_error("bad is '" + bad + "': use 'raise' or 'report'");
    request.stop_at_failure = bad == "raise";
    if (py::isinstance<py::str>(paths) || paths.size() != request.samples)
        throw py::value_error("out has " + std::to_string(request.samples) +
                              " samples, paths has " + std::to_string(paths.size()));
    for (const py::object item : paths) {
        const bool several = py::isinstance<py::list>(item) || py::isinstance<py::tuple>(item);
        if (request.paths.empty()) request.file_per_band = several;
        if (several != request.file_per_band)
            throw py::value_error("paths mixes files and lists of files");
        if (!several) {
            request.paths.push_back(path_bytes(item));
            continue;
        }
        const auto files = py::reinterpret_borrow<py::sequence>(item);
        if (files.size() != request.channels)
            throw py::value_error("a sample has " + std::to_string(files.size()) + " files for " +
                                  std::to_string(request.channels) + " channels");
        for (const py::object file : files) request.paths.push_back(path_bytes(file));
    }

    const Array<std::int64_t> band(checked(bands, "bands", "iu"));
    const auto n = static_cast<py::ssize_t>(request.samples);
    if (band.ndim() != 2 || band.shape(0) != n || band.shape(1) != out.shape(1))
        throw py::value_error("bands has the shape " + shape_of(band) + ", out " + shape_of(out) +
                              ": it needs [N, C]");
    request.bands = values(band);
    for (const std::int64_t b : request.bands)
        if (b < 0) throw py::value_error("bands holds " + std::to_string(b));
    if (!windows.is_none()) {
        const Array<double> window(checked(windows, "windows", "fiu"));
        if (window.ndim() != 2 || window.shape(0) != n || window.shape(1) != 4)
            throw py::value_error("windows has the shape " + shape_of(window) +
                                  ": it needs [N, 4]");
        request.windows = values(window);
        for (std::size_t i = 0; i < request.windows.size(); i += 4) {
            const double* w = request.windows.data() + i;
            constexpr double edge = 1 + 1e-9;
            if (!(w[0] >= 0 && w[1] >= 0 && w[2] > 0 && w[3] > 0 && w[0] + w[2] <= edge &&
                  w[1] + w[3] <= edge))
                throw py::value_error(
                    "window " + std::to_string(i / 4) +
                    " is not within the tile: it needs top, left, height, width as "
                    "fractions of it");
        }
    }
    if (!orient.is_none()) {
        const Array<std::int64_t> turn(checked(orient, "orient", "iu"));
        if (turn.ndim() != 1 || turn.shape(0) != n)
            throw py::value_error("orient has the shape " + shape_of(turn) + ": it needs [N]");
        for (py::ssize_t i = 0; i < n; ++i) {
            if (turn.at(i) < 0 || turn.at(i) > 7)
                throw py::value_error("orient holds " + std::to_string(turn.at(i)) +
                                      ": use 0 to 7");
            request.orient.push_back(static_cast<std::uint8_t>(turn.at(i)));
        }
    }
    if (!nodata.is_none()) request.nodata = nodata_text(nodata);
    if (!bands_in_file.is_none()) {
        const Array<std::int64_t> count(checked(bands_in_file, "bands_in_file", "iu"));
        const bool for_each_path = count.ndim() == (request.file_per_band ? 2 : 1) &&
                                   count.shape(0) == n &&
                                   (count.ndim() == 1 || count.shape(1) == out.shape(1));
        if (count.ndim() != 0 && !for_each_path)
            throw py::value_error("bands_in_file has the shape " + shape_of(count) +
                                  ": it needs one number, or one for each path");
        for (std::size_t i = 0; i < request.paths.size(); ++i) {
            const std::int64_t value = count.data()[count.ndim() == 0 ? 0 : i];
            if (value < 1 || value > 65535)
                throw py::value_error("bands_in_file holds " + std::to_string(value));
            request.bands_in_file.push_back(static_cast<std::uint32_t>(value));
        }
    }
    request.mean = statistics(mean, "mean", request);
    const bool mean_by_band = request.statistics_by_band;
    request.std = statistics(std, "std", request);
    if (!request.mean.empty() && !request.std.empty() && mean_by_band != request.statistics_by_band)
        throw py::value_error("mean and std differ in shape");
    return request;
}

class Reader {
  public:
    explicit Reader(int threads) {
        if (threads < 0 || threads > 1024)
            throw py::value_error("threads is " + std::to_string(threads));
        const unsigned count = threads == 0 ? usable_processors() : static_cast<unsigned>(threads);
        const pid_t here = made_in_;
        pool_ = SharedPool(new Pool(count), [here](Pool* pool) {
            if (getpid() == here) delete pool;  // in a forked child it cannot be, and is left
        });
    }
    ~Reader() {
        const WithoutGil released;
        pool_.reset();
    }

    py::object fill(const py::object& out, const py::sequence& paths, const py::object& bands,
                    const py::object& windows, const py::object& orient, const py::object& mean,
                    const py::object& std, const std::string& bad, const py::object& bands_in_file,
                    const py::object& nodata) {
        check_process(made_in_);
        py::array array = output_array(out);
        const auto batch = std::make_shared<Batch>(checked_request(
            array, paths, bands, windows, orient, mean, std, bad, bands_in_file, nodata));
        if (pool_->threads() > 1 && batch->request.samples > 1) {
            pool_->submit(batch);
            return Ticket(pool_, batch, std::move(array)).wait();
        }
        // Nobody to share the work with: no thread needs to be woken.
        until_done(*pool_, *batch, [&] { return pool_->work(*batch, between_signals); });
        return report(*batch);
    }

    Ticket submit(const py::object& out, const py::sequence& paths, const py::object& bands,
                  const py::object& windows, const py::object& orient, const py::object& mean,
                  const py::object& std, const std::string& bad, const py::object& bands_in_file,
                  const py::object& nodata) {
        check_process(made_in_);
        py::array array = output_array(out);
        auto batch = std::make_shared<Batch>(checked_request(
            array, paths, bands, windows, orient, mean, std, bad, bands_in_file, nodata));
        pool_->submit(batch);
        return Ticket(pool_, std::move(batch), std::move(array));
    }

  private:
    SharedPool pool_;
    pid_t made_in_ = getpid();
};

std::vector<std::string> codecs() {
    std::vector<std::string> names;
    for (const Compression codec : Codec::available()) names.push_back(compression_name(codec));
    return names;
}

constexpr const char* fill_doc =
    R"(Fills `out` and returns a Report. The GIL is released throughout.

out      float32, C-contiguous, writeable [N, C, H, W]: numpy array or CPU tensor, pinned or not
paths    N files or, where bands lie in files of their own, N lists of C files; equal neighbours
         in a list are opened once
bands    int [N, C], 0-based in the file
windows  float64 [N, 4]: top, left, height, width as fractions of the tile; None: the whole tile
orient   uint8 [N]: the sum of 4 transpose, then 2 flip up-down, then 1 flip left-right; None: 0
mean, std  float32, by band of the file or [N, C]; the output is (x - mean) / std; None: 0, 1
bad      "raise": TileError for the lowest failing index (attribute `index`), the rest of `out` is
         undefined; "report": failing samples are zeros and listed in the report's `errors`
bands_in_file  how many bands each file must have, one number or one for each path: a file with
         another count cannot be read; None: any number
nodata   this value is nodata in files that have no such tag of their own; None: none is

Windows are resampled to H x W as PIL's resize(BICUBIC, box=window) does on mode "F": bicubic,
a = -0.5, antialiased when shrinking; a window of exactly H x W whole pixels is copied exactly.
Samples that are NaN, infinite or the file's nodata become the mean before resampling and are
counted, where the window or the filter's margin around it touches them.

Raises TileError (a file that cannot be read), TypeError and ValueError (arguments), RuntimeError
(a Reader from before a fork).)";

}  // namespace
}  // namespace bandcrop

PYBIND11_MODULE(core, m) {
    using namespace bandcrop;
    m.doc() =
        "Reads, band-selects, crops and resamples GeoTIFF tiles into caller-owned float32 batches.";
    py::object tile_error = py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(
        "bandcrop.TileError",
        "A file that cannot be read: names it, what is wrong, and the TIFF tag or byte offset.\n\n"
        "`index` is its sample's place in the batch, or None.",
        nullptr, nullptr));
    tile_error.attr("index") = py::none();
    m.attr("TileError") = tile_error;

    py::class_<Layout>(m, "TileInfo", "Layout of a TIFF file's first image.")
        .def_readonly("height", &Layout::height, "pixels")
        .def_readonly("width", &Layout::width, "pixels")
        .def_readonly("bands", &Layout::bands)
        .def_property_readonly("dtype", &type_name,
                               "numpy's name of the samples' type, e.g. 'uint16'")
        .def_property_readonly(
            "planar", [](const Layout& t) { return t.separate ? "separate" : "interleaved"; },
            "'interleaved' (bands of a pixel together) or 'separate' (one plane a band)")
        .def_property_readonly(
            "compression", [](const Layout& t) { return compression_name(t.compression); },
            "'none', 'packbits', 'lzw', 'deflate' or 'zstd'")
        .def_readonly("tiled", &Layout::tiled)
        .def_readonly("big_tiff", &Layout::big_tiff)
        .def_property_readonly("byte_order",
                               [](const Layout& t) { return t.big_endian ? "big" : "little"; })
        .def_property_readonly(
            "nodata", [](const Layout& t) { return nodata(t); },
            "the sample that GDAL takes for nodata, an int or a float as the samples are; None: "
            "none is named that the file's type can hold")
        .def_readonly("epsg", &Layout::epsg, "EPSG code of the coordinate system, or None")
        .def("__repr__", [](const Layout& t) {
            return "TileInfo(" + std::to_string(t.bands) + " x " + std::to_string(t.height) +
                   " x " + std::to_string(t.width) + " " + type_name(t) + ", " +
                   compression_name(t.compression) + ")";
        });

    py::class_<Report>(m, "Report", "What a filled batch met.")
        .def_readonly("replaced", &Report::replaced,
                      "int64 [N]: non-finite and nodata samples that became the band's mean")
        .def_readonly("errors", &Report::errors, "list of (index, message), lowest index first")
        .def_readonly("bytes_read", &Report::bytes_read, "bytes of pixels read from files");

    py::class_<Ticket>(m, "Ticket",
                       "A batch under way. Dropping it cancels what has not started and waits for "
                       "what has.")
        .def("wait", &Ticket::wait, "Returns the batch's Report, or raises what fill() would.");

    py::class_<Reader>(m, "Reader", "Fills batches from GeoTIFF files with a pool of threads.")
        .def(py::init<int>(), "threads"_a = 0,
             "threads: how many; 0: one for each processor that this process may use.")
        .def("fill", &Reader::fill, "out"_a, "paths"_a, "bands"_a, "windows"_a = py::none(),
             "orient"_a = py::none(), "mean"_a = py::none(), "std"_a = py::none(),
             "bad"_a = "raise", "bands_in_file"_a = py::none(), "nodata"_a = py::none(), fill_doc)
        .def("submit", &Reader::submit, "out"_a, "paths"_a, "bands"_a, "windows"_a = py::none(),
             "orient"_a = py::none(), "mean"_a = py::none(), "std"_a = py::none(),
             "bad"_a = "raise", "bands_in_file"_a = py::none(), "nodata"_a = py::none(),
             "Like fill(), but returns a Ticket at once; batches may overlap. `out` is kept alive "
             "and\n"
             "must not be touched until Ticket.wait() returns.");

    m.def("info", &read_info, "path"_a, "nodata"_a = py::none(),
          "Layout of a TIFF file's first image; nodata as for Reader.fill. Raises TileError.");
    m.def("read", &read_samples, "path"_a, "bands"_a = py::none(), "window"_a = py::none(),
          "Samples as they are: [bands, height, width] in the file's dtype.\n\n"
          "bands   list of int, 0-based; None: all\n"
          "window  top, left, height, width in whole pixels; None: the whole tile\n\n"
          "Raises TileError (the file), IndexError (bands) and ValueError (window).");
    m.def("codecs", &codecs, "Compressions that this build decodes.");
}

// What Python calls. pybind11's own start would wait for ever in a sub-interpreter (Python < 3.12).
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "bandcrop works in Python's main interpreter only");
        return nullptr;
    }
    return PyInit_core();
}
