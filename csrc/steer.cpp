#include "steer.hpp"

#include <algorithm>

#include "operators.hpp"

namespace pysteer {

void Steerer::resize(std::size_t n_embd) {
    n_embd_ = n_embd;
    sum_.assign(n_embd, 0.0f);
    begin_node();
}

void Steerer::reserve(const Plan & plan) {
    factors_.resize(std::max(factors_.size(), plan.most_ops()));
    unshared_.resize(factors_.size());
    shared_.resize(factors_.size());
    shares_.reserve(plan.most_ops());
    scratch_.resize(std::max(scratch_.size(), plan.most_rows()));
}

bool Steerer::acts(const Sequence & sequence, int64_t position, Place place) noexcept {
    const Plan & plan = sequence.plan();
    const bool before_gate = plan.before_gate(place);
    const std::vector<Plan::Op> & ops = plan.ops(place);
    return std::any_of(ops.begin(), ops.end(),
                       [&](const Plan::Op & op) { return sequence.factor(op.term, position, before_gate) != 0.0f; });
}

bool Steerer::steer(const Sequence & sequence, int64_t position, Place place, float * values) noexcept {
    switch (find_factors(sequence, position, place)) {
        case Way::none:
            return false;
        case Way::additions:
            add(values, sum(sequence.plan(), place), n_embd_);
            return true;
        case Way::operators:
            apply_in_order(sequence.plan(), place, values);
            return true;
    }
    return false;
}

const float * Steerer::addition(const Sequence & sequence, int64_t position, Place place) noexcept {
    begin_node();
    find_factors(sequence, position, place);
    return sum(sequence.plan(), place);
}

Steerer::Way Steerer::find_factors(const Sequence & sequence, int64_t position, Place place) noexcept {
    const Plan & plan = sequence.plan();
    const std::vector<Plan::Op> & ops = plan.ops(place);
    const bool before_gate = plan.before_gate(place);
    Way way = Way::none;
    for (std::size_t k = 0; k < ops.size(); ++k) {
        factors_[k] = sequence.factor(ops[k].term, position, before_gate);
        if (factors_[k] == 0.0f) {
            continue;
        }
        const bool adds = plan.terms()[ops[k].term].op.sums();
        way = adds && way != Way::operators ? Way::additions : Way::operators;
    }
    return way;
}

void Steerer::find_shares(const Plan & plan, Place place) noexcept {
    const std::size_t count = plan.ops(place).size();
    const auto end = factors_.begin() + static_cast<std::ptrdiff_t>(count);
    if (shared_for_ == &plan && std::equal(factors_.begin(), end, unshared_.begin())) {
        return;
    }
    std::copy(factors_.begin(), end, unshared_.begin());
    std::copy(factors_.begin(), end, shared_.begin());
    shares_.apply(plan.gram(place), count, shared_.data());
    shared_for_ = &plan;
    summed_ = false;
}

const float * Steerer::sum(const Plan & plan, Place place) noexcept {
    find_shares(plan, place);
    if (!summed_) {
        plan.sum(place, shared_.data(), sum_.data());
        summed_ = true;
    }
    return sum_.data();
}

void Steerer::apply_in_order(const Plan & plan, Place place, float * values) noexcept {
    find_shares(plan, place);
    summed_ = false;
    const std::vector<Plan::Op> & ops = plan.ops(place);
    bool pending = false;  // additions that follow each other are summed first, as llama.cpp's control vector is
    for (std::size_t k = 0; k < ops.size(); ++k) {
        const float factor = shared_[k];
        if (factor == 0.0f) {
            continue;
        }
        const Operator & op = plan.terms()[ops[k].term].op;
        if (op.sums()) {
            add_scaled(sum_.data(), !pending, factor, ops[k].rows, n_embd_);
            pending = true;
            continue;
        }
        if (pending) {
            add(values, sum_.data(), n_embd_);
            pending = false;
        }
        apply(op, ops[k].rows, ops[k].n_rows, factor, values, n_embd_, scratch_.data());
    }
    if (pending) {
        add(values, sum_.data(), n_embd_);
    }
}

}  // namespace pysteer
