// Type conversion and GIL release, nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "capture.hpp"
#include "hook.hpp"
#include "llama_abi.hpp"
#include "plan.hpp"

namespace py = pybind11;

namespace {

using pysteer::Capture;
using pysteer::FoundSite;
using pysteer::Hook;
using pysteer::Plan;
using pysteer::Site;
using Floats = py::array_t<float, py::array::c_style>;
using Integers = py::array_t<int32_t, py::array::c_style>;
using Flags = py::array_t<uint8_t, py::array::c_style>;

void add_to_plan(Plan & plan, Site site, const Integers & layers, const Floats & directions, float strength) {
    if (layers.ndim() != 1 || directions.ndim() != 2 || directions.shape(0) != layers.shape(0) ||
        static_cast<std::size_t>(directions.shape(1)) != plan.n_embd()) {
        throw std::invalid_argument("directions must be (layers, " + std::to_string(plan.n_embd()) + ")");
    }
    plan.add(site, layers.data(), static_cast<std::size_t>(layers.shape(0)), directions.data(), strength);
}

py::object read_capture(const Capture & capture, Site site, std::size_t layer) {
    Floats out({static_cast<py::ssize_t>(capture.n_slots()), static_cast<py::ssize_t>(capture.n_embd())});
    float * data = out.mutable_data();
    {
        const py::gil_scoped_release release;
        capture.read(site, layer, data);
    }
    return out;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native hook on llama.cpp's graphs. Use pysteer.hooked and pysteer.SteeredLlama instead.";

    py::register_exception<pysteer::NotOnHost>(module, "NotOnHost", PyExc_NotImplementedError);

    module.def("load_abi", &pysteer::load_abi, py::arg("library_handle"), py::arg("library_folder"));
    module.def("ggml_version", [] { return std::string(pysteer::abi().ggml_version()); });
    module.attr("callback_address") = reinterpret_cast<std::uintptr_t>(&Hook::callback);

    py::enum_<Site>(module, "Site")
        .value("residual", Site::residual)
        .value("attention", Site::attention)
        .value("mlp", Site::mlp);

    py::class_<FoundSite>(module, "FoundSite")
        .def_readonly("site", &FoundSite::site)
        .def_readonly("layer", &FoundSite::layer)
        .def_readonly("node", &FoundSite::node)
        .def_readonly("backend", &FoundSite::backend)
        .def_readonly("on_host", &FoundSite::on_host);

    py::class_<Plan, std::shared_ptr<Plan>>(module, "Plan")
        .def(py::init<std::size_t, std::size_t>(), py::arg("n_layer"), py::arg("n_embd"))
        .def("add", &add_to_plan, py::arg("site"), py::arg("layers").noconvert(), py::arg("directions").noconvert(),
             py::arg("strength"), py::keep_alive<1, 4>())
        .def("check_finite", &Plan::check_finite)
        .def("keep_sums", &Plan::keep_sums)
        .def_property_readonly("fits_resident", &Plan::fits_resident)
        .def_property_readonly("empty", &Plan::empty);

    py::class_<Capture>(module, "Capture").def("read", &read_capture, py::arg("site"), py::arg("layer"));

    py::class_<Hook>(module, "Hook")
        .def(py::init<>())
        .def_property_readonly("address", [](const Hook & hook) { return reinterpret_cast<std::uintptr_t>(&hook); })
        .def("begin_probe", &Hook::begin_probe, py::arg("n_layer"), py::arg("n_embd"))
        .def("end_probe", &Hook::end_probe)
        .def_property_readonly("sites", &Hook::sites)
        .def(
            "set_plan",
            [](Hook & hook, std::shared_ptr<Plan> plan, bool resident) { hook.set_plan(std::move(plan), resident); },
            py::arg("plan").none(true), py::arg("resident"))
        .def("begin_decode", &Hook::begin_decode)
        .def("end_decode", &Hook::end_decode, py::arg("tokens_decoded"))
        .def("abandon_decode", &Hook::abandon_decode)
        .def(
            "begin_capture",
            [](Hook & hook, const Flags & wanted, const Integers & slots, std::size_t n_slots, std::size_t n_layer,
               std::size_t n_embd) {
                hook.begin_capture(std::make_unique<Capture>(
                    n_layer, n_embd, std::vector<uint8_t>(wanted.data(), wanted.data() + wanted.size()),
                    std::vector<int32_t>(slots.data(), slots.data() + slots.size()), n_slots));
            },
            py::kw_only(), py::arg("wanted").noconvert(), py::arg("slots").noconvert(), py::arg("n_slots"),
            py::arg("n_layer"), py::arg("n_embd"))
        .def("end_capture", &Hook::end_capture)
        .def("detach", &Hook::detach);
}
