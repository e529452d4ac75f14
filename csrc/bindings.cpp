// Conversion of types, checks of shapes, and release of the GIL only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capture.hpp"
#include "hook.hpp"
#include "llama_abi.hpp"
#include "plan.hpp"
#include "shares.hpp"

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
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::vector<T> copied(const Array<T> & values) {
    return {values.data(), values.data() + values.size()};
}

std::string shape_of(const py::array & array) {
    std::string text = "(";
    for (py::ssize_t k = 0; k < array.ndim(); ++k) {
        text += (k == 0 ? "" : ", ") + std::to_string(array.shape(k));
    }
    return text + (array.ndim() == 1 ? ",)" : ")");
}

// ---- plan -----------------------------------------------------------------------------------------------------------

Term make_term(const Operator & op, float strength, const Scope & scope, uint64_t digest, int32_t exclude_bit,
               std::vector<int32_t> rule, int32_t own_gate) {
    Term term;
    term.op = op;
    term.strength = strength;
    term.scope = scope;
    term.digest = digest;
    term.exclude_bit = exclude_bit;
    term.rule = std::move(rule);
    term.own_gate = own_gate;
    return term;
}

void add_to_plan(Plan & plan, Site site, const Array<int32_t> & layers, const Array<float> & rows, const Term & term) {
    if (layers.ndim() != 1 || rows.ndim() != 3 || rows.shape(0) != layers.shape(0) ||
        static_cast<std::size_t>(rows.shape(2)) != plan.n_embd()) {
        throw std::invalid_argument("expected directions of shape (layers, rows, " + std::to_string(plan.n_embd()) +
                                    "), found " + shape_of(rows) + " for layers of shape " + shape_of(layers));
    }
    // The array lives as long as any plan or sequence that reads it, whichever thread drops the last of them.
    const std::shared_ptr<const void> owner(new py::object(rows), [](const void * held) {
        const py::gil_scoped_acquire acquire;
        delete static_cast<const py::object *>(held);
    });
    plan.add(term, site, layers.data(), static_cast<std::size_t>(layers.shape(0)), rows.data(),
             static_cast<std::size_t>(rows.shape(1)), owner);
}

std::shared_ptr<Gate> make_gate(Site site, const std::vector<std::pair<std::size_t, bool>> & reads, Gate::Kind kind,
                                const Array<double> & weights, std::vector<double> offsets, std::vector<double> origin,
                                std::vector<double> allowances) {
    if (weights.ndim() != 2 || reads.empty() || static_cast<std::size_t>(weights.shape(1)) % reads.size() != 0) {
        throw std::invalid_argument("expected gate weights of shape (rows, reads x n_embd) for " +
                                    std::to_string(reads.size()) + " reads, found " + shape_of(weights));
    }
    std::vector<Gate::Read> places;
    for (const auto & [layer, pools] : reads) {
        places.push_back({layer, pools});
    }
    return std::make_shared<Gate>(site, std::move(places), kind,
                                  static_cast<std::size_t>(weights.shape(1)) / reads.size(), copied(weights),
                                  std::move(offsets), std::move(origin), std::move(allowances));
}

// The scores, or the ranks.
py::object gate_scores(const Gate & gate, const Array<double> & h, bool ranks) {
    if (static_cast<std::size_t>(h.size()) != gate.width()) {
        throw std::invalid_argument("expected " + std::to_string(gate.width()) + " values, found " +
                                    std::to_string(h.size()));
    }
    std::vector<double> out(gate.n_rows());
    std::vector<double> by(gate.n_rows());
    gate.scores(h.data(), out.data(), by.data());
    return Array<double>(static_cast<py::ssize_t>(gate.n_categories()), ranks ? by.data() : out.data());
}

std::vector<double> by_category(const Sequence & sequence, const double * values) {
    const Gate * gate = sequence.plan().gate();
    return {values, values + (gate != nullptr ? gate->n_categories() : 0)};
}

py::object apply_operator(const Operator & op, const Array<float> & rows, float strength, const Array<float> & h) {
    if (rows.ndim() != 2 || h.ndim() != 2 || rows.shape(1) != h.shape(1)) {
        throw std::invalid_argument("expected rows and h of shapes (rows, n_embd) and (n, n_embd), found " +
                                    shape_of(rows) + " and " + shape_of(h));
    }
    const auto width = static_cast<std::size_t>(h.shape(1));
    std::vector<double> scratch(static_cast<std::size_t>(rows.shape(0)));
    Array<float> out({h.shape(0), h.shape(1)});
    std::copy(h.data(), h.data() + h.size(), out.mutable_data());
    for (py::ssize_t k = 0; k < h.shape(0); ++k) {
        pysteer::apply(op, rows.data(), scratch.size(), strength,
                       out.mutable_data() + static_cast<std::size_t>(k) * width, width, scratch.data());
    }
    return out;
}

Array<float> shared_factors(const Array<double> & gram, const Array<float> & factors) {
    const auto n = static_cast<std::size_t>(factors.size());
    if (factors.ndim() != 1 || gram.ndim() != 2 || gram.shape(0) != factors.size() || gram.shape(1) != factors.size()) {
        throw std::invalid_argument("expected a gram matrix and factors of shapes (n, n) and (n,), found " +
                                    shape_of(gram) + " and " + shape_of(factors));
    }
    std::vector<double> triangle;
    for (std::size_t i = 0; i < n; ++i) {
        triangle.insert(triangle.end(), gram.data() + i * n, gram.data() + i * n + i + 1);
    }
    pysteer::Shares shares;
    shares.reserve(n);
    Array<float> out(factors.size(), factors.data());
    shares.apply(triangle.data(), n, out.mutable_data());
    return out;
}

bool has_usable_logits(const Array<float> & logits) {
    return pysteer::usable_logits(logits.data(), static_cast<std::size_t>(logits.size()));
}

// ---- sequence -------------------------------------------------------------------------------------------------------

std::shared_ptr<Sequence> make_sequence(std::shared_ptr<Plan> plan, int64_t n_prompt,
                                        const std::vector<std::pair<int64_t, int64_t>> & spans, int64_t n_positions) {
    std::vector<Sequence::Span> ranges;
    for (const auto & [start, stop] : spans) {
        ranges.push_back({start, stop});
    }
    return std::make_shared<Sequence>(std::move(plan), n_prompt, std::move(ranges), n_positions);
}

std::vector<int64_t> decisions(const Sequence & sequence) {
    std::vector<int64_t> positions;
    for (std::size_t k = 0; k < sequence.n_decisions(); ++k) {
        positions.push_back(sequence.decided_at(k));
    }
    return positions;
}

py::object sequence_keys(const Sequence & sequence, int64_t start, int64_t stop) {
    py::array_t<uint64_t> out(static_cast<py::ssize_t>(stop > start ? stop - start : 0));
    uint64_t * keys = out.mutable_data();
    for (int64_t position = start; position < stop; ++position) {
        *keys++ = sequence.key(position, true);
    }
    return out;
}

// ---- hook -----------------------------------------------------------------------------------------------------------

void begin_decode(Hook & hook, const Array<int32_t> & runs) {
    if (runs.ndim() != 2 || runs.shape(1) != 4) {
        throw std::invalid_argument("expected runs of shape (n, 4), found " + shape_of(runs));
    }
    std::vector<RowRun> rows;
    for (py::ssize_t k = 0; k < runs.shape(0); ++k) {
        rows.push_back({runs.at(k, 0), runs.at(k, 1), runs.at(k, 2), runs.at(k, 3)});
    }
    hook.begin_decode(rows.data(), rows.size());
}

void begin_capture(Hook & hook, const Array<uint8_t> & wanted, const Array<int32_t> & slots, std::size_t n_slots,
                   std::size_t n_layer, std::size_t n_embd) {
    hook.begin_capture(std::make_unique<Capture>(n_layer, n_embd, copied(wanted), copied(slots), n_slots));
}

py::object read_capture(const Capture & capture, Site site, std::size_t layer) {
    Array<float> out({static_cast<py::ssize_t>(capture.n_slots()), static_cast<py::ssize_t>(capture.n_embd())});
    float * data = out.mutable_data();
    {
        const py::gil_scoped_release release;
        capture.read({site, layer}, data);
    }
    return out;
}

// ---- module ---------------------------------------------------------------------------------------------------------

void bind_library(py::module_ & module) {
    module.def("load_abi", &pysteer::load_abi, py::arg("library_handle"), py::arg("library_folder"));
    module.def(
        "function_address",
        [](const std::string & name) { return reinterpret_cast<std::uintptr_t>(pysteer::find_function(name)); },
        py::arg("name"));
    module.def("ggml_version", [] { return std::string(pysteer::abi().ggml_version()); });
    module.attr("callback_address") = reinterpret_cast<std::uintptr_t>(&Hook::callback);
}

void bind_sites(py::module_ & module) {
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
}

void bind_operator_and_scope(py::module_ & module) {
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
    module.def("has_usable_logits", &has_usable_logits, py::arg("logits").noconvert());
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
}

void bind_gate(py::module_ & module) {
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
            "scores", [](const Gate & gate, const Array<double> & h) { return gate_scores(gate, h, false); },
            py::arg("h"))
        .def(
            "ranks", [](const Gate & gate, const Array<double> & h) { return gate_scores(gate, h, true); },
            py::arg("h"));
}

void bind_plan(py::module_ & module) {
    py::enum_<Injection>(module, "Injection")
        .value("automatic", Injection::automatic)
        .value("resident", Injection::resident)
        .value("hooked", Injection::hooked);
    py::enum_<ConflictRule>(module, "ConflictRule")
        .value("sum", ConflictRule::sum)
        .value("strongest", ConflictRule::strongest)
        .value("first", ConflictRule::first);
    py::class_<Term>(module, "Term")
        .def(py::init(&make_term), py::kw_only(), py::arg("operator"), py::arg("strength"), py::arg("scope"),
             py::arg("digest"), py::arg("exclude_bit") = -1, py::arg("rule") = std::vector<int32_t>{},
             py::arg("own_gate") = -1);
    py::class_<Plan, std::shared_ptr<Plan>>(module, "Plan")
        .def(py::init<std::size_t, std::size_t, Injection>(), py::arg("n_layer"), py::arg("n_embd"),
             py::arg("injection"))
        .def("add", &add_to_plan, py::arg("site"), py::arg("layers").noconvert(), py::arg("rows").noconvert(),
             py::arg("term"))
        .def("set_gate", &Plan::set_gate, py::arg("gate"), py::arg("thresholds"), py::arg("above"), py::arg("conflict"),
             py::arg("recheck"))
        .def("check_finite", &Plan::check_finite)
        .def_property_readonly("fits_resident", &Plan::fits_resident);
    module.def("shared_factors", &shared_factors, py::arg("gram").noconvert(), py::arg("factors").noconvert());
}

void bind_sequence(py::module_ & module) {
    py::class_<Sequence, std::shared_ptr<Sequence>>(module, "Sequence")
        .def(py::init(&make_sequence), py::arg("plan"), py::arg("n_prompt"), py::arg("spans"), py::arg("n_positions"))
        .def("keys", &sequence_keys, py::arg("start"), py::arg("stop"))
        .def(
            "logits_key", [](const Sequence & sequence, int64_t position) { return sequence.key(position); },
            py::arg("position"))
        .def_property_readonly("next_decision", &Sequence::next_decision)
        .def_property_readonly("wants_reprocess", &Sequence::wants_reprocess)
        .def_property_readonly("held", &Sequence::held)
        .def("hold", &Sequence::hold)
        .def("restart", &Sequence::restart)
        .def("undo_decision",
             [](Sequence & sequence) {
                 if (sequence.n_decisions() == 0) {
                     throw std::runtime_error("no decision to take back");
                 }
                 sequence.undo_decision();
             })
        .def_property_readonly("n_decisions", &Sequence::n_decisions)
        .def(
            "leave_out", [](Sequence & sequence, int64_t start, int64_t stop) { sequence.leave_out({start, stop}); },
            py::arg("start"), py::arg("stop"))
        .def(
            "set_excluded",
            [](Sequence & sequence, int64_t start, const Array<uint32_t> & masks) {
                sequence.set_excluded(start, masks.data(), static_cast<std::size_t>(masks.size()));
            },
            py::arg("start"), py::arg("masks").noconvert())
        .def_property_readonly("decided_at", &decisions)
        .def("fired", &Sequence::fired, py::arg("decision"), py::arg("term"))
        .def_property_readonly("scores", [](const Sequence & s) { return by_category(s, s.scores()); })
        .def_property_readonly("ranks", [](const Sequence & s) { return by_category(s, s.ranks()); })
        .def("tokens_steered", py::overload_cast<std::size_t, int64_t>(&Sequence::tokens_steered, py::const_),
             py::arg("term"), py::arg("n_tokens"))
        .def("tokens_steered", py::overload_cast<int64_t>(&Sequence::tokens_steered, py::const_), py::arg("n_tokens"));
}

void bind_hook(py::module_ & module) {
    py::class_<Capture>(module, "Capture").def("read", &read_capture, py::arg("site"), py::arg("layer"));
    py::class_<Hook>(module, "Hook")
        .def(py::init<>())
        .def_property_readonly("address", [](const Hook & hook) { return reinterpret_cast<std::uintptr_t>(&hook); })
        .def("begin_probe", &Hook::begin_probe, py::arg("n_layer"), py::arg("n_embd"), py::arg("n_tokens"))
        .def("end_probe", &Hook::end_probe)
        .def_property_readonly("sites", &Hook::sites)
        .def("set_sequence", &Hook::set_sequence, py::arg("slot"), py::arg("sequence").none(true))
        .def("next_decision", &Hook::next_decision, py::arg("slot"))
        .def("begin_decode", &begin_decode, py::arg("runs").noconvert())
        .def("end_decode", &Hook::end_decode)
        .def("begin_foreign", &Hook::begin_foreign, py::arg("slot"), py::arg("position"), py::arg("n_rows"),
             py::arg("n_positions"))
        .def("end_foreign", &Hook::end_foreign)
        .def_property_readonly("was_resident", &Hook::was_resident)
        .def_property_readonly("cuts", &Hook::cuts)
        .def("abandon_decode", &Hook::abandon_decode)
        .def("begin_capture", &begin_capture, py::kw_only(), py::arg("wanted").noconvert(),
             py::arg("slots").noconvert(), py::arg("n_slots"), py::arg("n_layer"), py::arg("n_embd"))
        .def("end_capture", &Hook::end_capture)
        .def("detach", &Hook::detach);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native hook on llama.cpp's graphs. Use pysteer.llama.hooked and pysteer.SteeredLlama instead.";
    bind_library(module);
    bind_sites(module);
    bind_operator_and_scope(module);
    bind_gate(module);
    bind_plan(module);
    bind_sequence(module);
    bind_hook(module);
}
