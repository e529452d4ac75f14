// Type conversion and GIL release, nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "capture.hpp"
#include "hook.hpp"
#include "llama_abi.hpp"
#include "plan.hpp"

namespace py = pybind11;

namespace {

using pysteer::Capture;
using pysteer::ConflictRule;
using pysteer::Gate;
using pysteer::Hook;
using pysteer::Injection;
using pysteer::Operator;
using pysteer::OperatorKind;
using pysteer::Plan;
using pysteer::RowRun;
using pysteer::Scope;
using pysteer::Sequence;
using pysteer::Site;
using pysteer::SiteNode;
using pysteer::Term;
using Floats = py::array_t<float, py::array::c_style>;
using Integers = py::array_t<int32_t, py::array::c_style>;
using Flags = py::array_t<uint8_t, py::array::c_style>;

using Doubles = py::array_t<double, py::array::c_style>;
using Masks = py::array_t<uint32_t, py::array::c_style>;
using Runs = py::array_t<int32_t, py::array::c_style>;

void add_to_plan(Plan & plan, Site site, const Integers & layers, const Floats & rows, const Operator & op,
                 float strength, const Scope & scope, uint64_t digest, int32_t exclude_bit, std::vector<int32_t> rule,
                 int32_t own_gate) {
    if (layers.ndim() != 1 || rows.ndim() != 3 || rows.shape(0) != layers.shape(0) ||
        static_cast<std::size_t>(rows.shape(2)) != plan.n_embd()) {
        throw std::invalid_argument("directions must be (layers, rows, " + std::to_string(plan.n_embd()) + ")");
    }
    Term term;
    term.op = op;
    term.strength = strength;
    term.scope = scope;
    term.digest = digest;
    term.exclude_bit = exclude_bit;
    term.rule = std::move(rule);
    term.own_gate = own_gate;
    // The array lives as long as any plan or sequence that reads it, whichever thread drops the last of them.
    const std::shared_ptr<const void> owner(new py::object(rows), [](const void * held) {
        const py::gil_scoped_acquire acquire;
        delete static_cast<const py::object *>(held);
    });
    plan.add(std::move(term), site, layers.data(), static_cast<std::size_t>(layers.shape(0)), rows.data(),
             static_cast<std::size_t>(rows.shape(1)), owner);
}

std::shared_ptr<Gate> make_gate(Site site, const std::vector<std::pair<std::size_t, bool>> & reads, Gate::Kind kind,
                                const Doubles & weights, std::vector<double> offsets, std::vector<double> origin,
                                std::vector<double> allowances) {
    if (weights.ndim() != 2 || reads.empty() || static_cast<std::size_t>(weights.shape(1)) % reads.size() != 0) {
        throw std::invalid_argument("a gate's weights must be (rows, reads x n_embd)");
    }
    std::vector<Gate::Read> places;
    for (const auto & [layer, pools] : reads) {
        places.push_back({layer, pools});
    }
    return std::make_shared<Gate>(site, std::move(places), kind,
                                  static_cast<std::size_t>(weights.shape(1)) / reads.size(),
                                  std::vector<double>(weights.data(), weights.data() + weights.size()),
                                  std::move(offsets), std::move(origin), std::move(allowances));
}

// The scores, or what open gates are compared by.
py::object gate_scores(const Gate & gate, const Doubles & h, bool ranks) {
    if (static_cast<std::size_t>(h.size()) != gate.width()) {
        throw std::invalid_argument("a gate looks at " + std::to_string(gate.width()) + " values");
    }
    std::vector<double> out(gate.n_rows());
    std::vector<double> by(gate.n_rows());
    gate.scores(h.data(), out.data(), by.data());
    return Doubles(static_cast<py::ssize_t>(gate.n_categories()), ranks ? by.data() : out.data());
}

std::vector<double> of_gate(const Sequence & sequence, const double * values) {
    const Gate * gate = sequence.plan().gate();
    return {values, values + (gate != nullptr ? gate->n_categories() : 0)};
}

py::object apply_operator(const Operator & op, const Floats & rows, float strength, const Floats & h) {
    if (rows.ndim() != 2 || h.ndim() != 2 || rows.shape(1) != h.shape(1)) {
        throw std::invalid_argument("rows and h must be matrices of the same width");
    }
    const auto width = static_cast<std::size_t>(h.shape(1));
    std::vector<double> scratch(static_cast<std::size_t>(rows.shape(0)));
    Floats out({h.shape(0), h.shape(1)});
    std::copy(h.data(), h.data() + h.size(), out.mutable_data());
    for (py::ssize_t k = 0; k < h.shape(0); ++k) {
        pysteer::apply(op, rows.data(), scratch.size(), strength,
                       out.mutable_data() + static_cast<std::size_t>(k) * width, width, scratch.data());
    }
    return out;
}

py::object sequence_keys(const Sequence & sequence, int64_t start, int64_t stop) {
    py::array_t<uint64_t> out(static_cast<py::ssize_t>(stop > start ? stop - start : 0));
    uint64_t * keys = out.mutable_data();
    for (int64_t position = start; position < stop; ++position) {
        *keys++ = sequence.key(position, true);
    }
    return out;
}

void begin_decode(Hook & hook, const Runs & runs) {
    if (runs.ndim() != 2 || runs.shape(1) != 4) {
        throw std::invalid_argument("runs must be (n, 4): slot, position, count, outputs");
    }
    std::vector<RowRun> found;
    for (py::ssize_t k = 0; k < runs.shape(0); ++k) {
        found.push_back({runs.at(k, 0), runs.at(k, 1), runs.at(k, 2), runs.at(k, 3)});
    }
    hook.begin_decode(found.data(), found.size());
}

py::object read_capture(const Capture & capture, Site site, std::size_t layer) {
    Floats out({static_cast<py::ssize_t>(capture.n_slots()), static_cast<py::ssize_t>(capture.n_embd())});
    float * data = out.mutable_data();
    {
        const py::gil_scoped_release release;
        capture.read({site, layer}, data);
    }
    return out;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native hook on llama.cpp's graphs. Use pysteer.llama.hooked and pysteer.SteeredLlama instead.";

    py::register_exception<pysteer::NotOnHost>(module, "NotOnHost", PyExc_NotImplementedError);

    module.def("load_abi", &pysteer::load_abi, py::arg("library_handle"), py::arg("library_folder"));
    module.def("ggml_version", [] { return std::string(pysteer::abi().ggml_version()); });
    module.attr("callback_address") = reinterpret_cast<std::uintptr_t>(&Hook::callback);

    py::enum_<Site>(module, "Site")
        .value("residual", Site::residual)
        .value("attention", Site::attention)
        .value("mlp", Site::mlp);

    py::class_<SiteNode>(module, "SiteNode")
        .def_readonly("site", &SiteNode::site)
        .def_readonly("layer", &SiteNode::layer)
        .def_readonly("node", &SiteNode::node)
        .def_readonly("backend", &SiteNode::backend)
        .def_readonly("on_host", &SiteNode::on_host);

    py::enum_<Injection>(module, "Injection")
        .value("automatic", Injection::automatic)
        .value("resident", Injection::resident)
        .value("hooked", Injection::hooked);
    py::enum_<ConflictRule>(module, "ConflictRule")
        .value("sum", ConflictRule::sum)
        .value("strongest", ConflictRule::strongest)
        .value("first", ConflictRule::first);
    py::enum_<OperatorKind>(module, "OperatorKind")
        .value("add", OperatorKind::add)
        .value("ablate", OperatorKind::ablate)
        .value("clamp", OperatorKind::clamp)
        .value("rotate", OperatorKind::rotate)
        .value("low_rank", OperatorKind::low_rank);
    py::class_<Operator>(module, "Operator")
        .def(py::init([](OperatorKind kind, bool keep_norm, bool one_sided, bool target, float low, float high,
                         float angle) { return Operator{kind, keep_norm, one_sided, target, low, high, angle}; }),
             py::arg("kind"), py::kw_only(), py::arg("keep_norm"), py::arg("one_sided"), py::arg("target"),
             py::arg("low"), py::arg("high"), py::arg("angle"))
        .def("apply", &apply_operator, py::arg("rows"), py::arg("strength"), py::arg("h"));
    py::enum_<Scope::Kind>(module, "ScopeKind")
        .value("all", Scope::Kind::all)
        .value("positions", Scope::Kind::positions)
        .value("response", Scope::Kind::response)
        .value("linear", Scope::Kind::linear)
        .value("cosine", Scope::Kind::cosine)
        .value("values", Scope::Kind::values);
    py::class_<Scope>(module, "Scope")
        .def(py::init([](Scope::Kind kind, int64_t start, int64_t stop, std::vector<float> values) {
                 return Scope{kind, start, stop, std::move(values)};
             }),
             py::arg("kind"), py::arg("start") = 0, py::arg("stop") = 0, py::arg("values") = std::vector<float>{})
        .def("factor", &Scope::factor, py::arg("position"), py::arg("n_prompt"));
    py::enum_<Gate::Kind>(module, "GateKind")
        .value("margin", Gate::Kind::margin)
        .value("multinomial", Gate::Kind::multinomial)
        .value("probe", Gate::Kind::probe)
        .value("centroid", Gate::Kind::centroid)
        .value("cast", Gate::Kind::cast);
    py::class_<Gate, std::shared_ptr<Gate>>(module, "Gate")
        .def(py::init(&make_gate), py::arg("site"), py::arg("reads"), py::arg("kind"), py::arg("weights").noconvert(),
             py::arg("offsets"), py::arg("origin"), py::arg("allowances"))
        .def(
            "scores", [](const Gate & gate, const Doubles & h) { return gate_scores(gate, h, false); }, py::arg("h"))
        .def("ranks", [](const Gate & gate, const Doubles & h) { return gate_scores(gate, h, true); }, py::arg("h"));

    py::class_<Plan, std::shared_ptr<Plan>>(module, "Plan")
        .def(py::init<std::size_t, std::size_t, Injection>(), py::arg("n_layer"), py::arg("n_embd"),
             py::arg("injection"))
        .def("add", &add_to_plan, py::arg("site"), py::arg("layers").noconvert(), py::arg("rows").noconvert(),
             py::arg("operator"), py::arg("strength"), py::arg("scope"), py::arg("digest"), py::arg("exclude_bit"),
             py::arg("rule"), py::arg("own_gate"))
        .def("set_gate", &Plan::set_gate, py::arg("gate"), py::arg("thresholds"), py::arg("above"), py::arg("conflict"),
             py::arg("recheck"))
        .def("check_finite", &Plan::check_finite)
        .def_property_readonly("fits_resident", &Plan::fits_resident);

    py::class_<Sequence, std::shared_ptr<Sequence>>(module, "Sequence")
        .def(py::init([](std::shared_ptr<Plan> plan, int64_t n_prompt,
                         const std::vector<std::pair<int64_t, int64_t>> & spans, int64_t positions) {
                 std::vector<Sequence::Span> found;
                 for (const auto & [start, stop] : spans) {
                     found.push_back({start, stop});
                 }
                 return std::make_shared<Sequence>(std::move(plan), n_prompt, std::move(found), positions);
             }),
             py::arg("plan"), py::arg("n_prompt"), py::arg("spans"), py::arg("n_positions"))
        .def("keys", &sequence_keys, py::arg("start"), py::arg("stop"))
        .def(
            "logits_key", [](const Sequence & sequence, int64_t position) { return sequence.key(position); },
            py::arg("position"))
        .def_property_readonly("next_decision", &Sequence::next_decision)
        .def_property_readonly("wants_reprocess", &Sequence::wants_reprocess)
        .def_property_readonly("held", &Sequence::held)
        .def("hold", &Sequence::hold)
        .def("restart", &Sequence::restart)
        .def(
            "set_excluded",
            [](Sequence & sequence, int64_t start, const Masks & masks) {
                sequence.set_excluded(start, masks.data(), static_cast<std::size_t>(masks.size()));
            },
            py::arg("start"), py::arg("masks").noconvert())
        .def_property_readonly("decided_at",
                               [](const Sequence & sequence) {
                                   std::vector<int64_t> out;
                                   for (std::size_t k = 0; k < sequence.n_decisions(); ++k) {
                                       out.push_back(sequence.decided_at(k));
                                   }
                                   return out;
                               })
        .def("fired", &Sequence::fired, py::arg("decision"), py::arg("term"))
        .def_property_readonly("scores", [](const Sequence & sequence) { return of_gate(sequence, sequence.scores()); })
        .def_property_readonly("ranks", [](const Sequence & sequence) { return of_gate(sequence, sequence.ranks()); })
        .def("tokens_steered", py::overload_cast<std::size_t, int64_t>(&Sequence::tokens_steered, py::const_),
             py::arg("term"), py::arg("n_tokens"))
        .def("tokens_steered", py::overload_cast<int64_t>(&Sequence::tokens_steered, py::const_), py::arg("n_tokens"));

    py::class_<Capture>(module, "Capture").def("read", &read_capture, py::arg("site"), py::arg("layer"));

    py::class_<Hook>(module, "Hook")
        .def(py::init<>())
        .def_property_readonly("address", [](const Hook & hook) { return reinterpret_cast<std::uintptr_t>(&hook); })
        .def("begin_probe", &Hook::begin_probe, py::arg("n_layer"), py::arg("n_embd"))
        .def("end_probe", &Hook::end_probe)
        .def_property_readonly("sites", &Hook::sites)
        .def("set_sequence", &Hook::set_sequence, py::arg("slot"), py::arg("sequence").none(true))
        .def("next_decision", &Hook::next_decision, py::arg("slot"))
        .def("begin_decode", &begin_decode, py::arg("runs").noconvert())
        .def("end_decode", &Hook::end_decode)
        .def_property_readonly("was_resident", &Hook::was_resident)
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
