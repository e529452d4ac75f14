#include "gate.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace pysteer {
namespace {

double dot(const double * a, const double * b, std::size_t width) noexcept {
    double sum = 0.0;
    for (std::size_t i = 0; i < width; ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

double over_lengths(double product, double squared_a, double squared_b) noexcept {
    const double lengths = std::sqrt(squared_a) * std::sqrt(squared_b);
    return lengths > 0.0 ? product / lengths : 0.0;
}

}  // namespace

Gate::Gate(Site site, std::size_t layer, Kind kind, std::size_t n_embd, std::vector<double> weights,
           std::vector<double> offsets, std::vector<double> origin)
    : site_(site),
      layer_(layer),
      kind_(kind),
      n_embd_(n_embd),
      n_rows_(n_embd == 0 ? 0 : weights.size() / n_embd),
      weights_(std::move(weights)),
      offsets_(std::move(offsets)),
      origin_(std::move(origin)) {
    const bool linear = kind == Kind::multinomial || kind == Kind::probe;
    if (n_rows_ == 0 || weights_.size() != n_rows_ * n_embd || n_categories() == 0 ||
        offsets_.size() != (linear ? n_rows_ : 0) || origin_.size() != (kind == Kind::centroid ? n_embd : 0)) {
        throw std::invalid_argument("the parts of the gate do not fit each other");
    }
}

double Gate::cosine(const double * h, const double * row) const noexcept {
    double product = 0.0;
    double squared_h = 0.0;
    for (std::size_t i = 0; i < n_embd_; ++i) {
        const double from_origin = h[i] - origin_[i];
        product += from_origin * row[i];
        squared_h += from_origin * from_origin;
    }
    return over_lengths(product, squared_h, dot(row, row, n_embd_));
}

double Gate::condition(const double * h, const double * row) const noexcept {
    const double along = dot(h, row, n_embd_);
    double product = 0.0;
    double squared = 0.0;
    for (std::size_t i = 0; i < n_embd_; ++i) {
        const double bounded = std::tanh(along * row[i]);
        product += h[i] * bounded;
        squared += bounded * bounded;
    }
    return over_lengths(product, dot(h, h, n_embd_), squared);
}

void Gate::scores(const double * h, double * out) const noexcept {
    for (std::size_t k = 0; k < n_rows_; ++k) {
        const double * row = weights_.data() + k * n_embd_;
        switch (kind_) {
            case Kind::multinomial:
            case Kind::probe:
                out[k] = dot(h, row, n_embd_) + offsets_[k];
                break;
            case Kind::centroid:
                out[k] = cosine(h, row);
                break;
            case Kind::cast:
                out[k] = condition(h, row);
                break;
        }
    }
    if (kind_ == Kind::multinomial) {
        const double largest = *std::max_element(out, out + n_rows_);
        double sum = 0.0;
        for (std::size_t k = 0; k < n_rows_; ++k) {
            out[k] = std::exp(out[k] - largest);
            sum += out[k];
        }
        for (std::size_t k = 0; k + 1 < n_rows_; ++k) {
            out[k] = out[k + 1] / sum;
        }
    }
}

}  // namespace pysteer
