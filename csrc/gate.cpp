#include "gate.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
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

Gate::Gate(Site site, std::vector<Read> reads, Kind kind, std::size_t n_embd, std::vector<double> weights,
           std::vector<double> offsets, std::vector<double> origin, std::vector<double> allowances)
    : site_(site),
      reads_(std::move(reads)),
      kind_(kind),
      n_embd_(n_embd),
      n_rows_(width() == 0 ? 0 : weights.size() / width()),
      weights_(std::move(weights)),
      offsets_(std::move(offsets)),
      origin_(std::move(origin)),
      allowances_(std::move(allowances)) {
    const bool linear = has_benign_row() || kind == Kind::probe;
    if (n_rows_ == 0 || weights_.size() != n_rows_ * width() || n_categories() == 0 ||
        offsets_.size() != (linear ? n_rows_ : 0) || origin_.size() != (kind == Kind::centroid ? width() : 0) ||
        allowances_.size() != (kind == Kind::margin ? n_categories() : 0)) {
        throw std::invalid_argument("the gate's weights (" + std::to_string(weights_.size()) +
                                    " values for a width of " + std::to_string(width()) + "), offsets (" +
                                    std::to_string(offsets_.size()) + "), origin (" + std::to_string(origin_.size()) +
                                    ") and allowances (" + std::to_string(allowances_.size()) +
                                    ") do not fit its kind");
    }
    for (const Read & read : reads_) {
        layer_ = std::max(layer_, read.layer);
    }
}

bool Gate::reads_at(Place place) const noexcept {
    return place.site == site_ &&
           std::any_of(reads_.begin(), reads_.end(), [&](const Read & read) { return read.layer == place.layer; });
}

double Gate::cosine(const double * h, const double * row) const noexcept {
    double product = 0.0;
    double squared_h = 0.0;
    for (std::size_t i = 0; i < width(); ++i) {
        const double from_origin = h[i] - origin_[i];
        product += from_origin * row[i];
        squared_h += from_origin * from_origin;
    }
    return over_lengths(product, squared_h, dot(row, row, width()));
}

double Gate::condition(const double * h, const double * row) const noexcept {
    const double along = dot(h, row, width());
    double product = 0.0;
    double squared = 0.0;
    for (std::size_t i = 0; i < width(); ++i) {
        const double bounded = std::tanh(along * row[i]);
        product += h[i] * bounded;
        squared += bounded * bounded;
    }
    return over_lengths(product, dot(h, h, width()), squared);
}

// Turns the logits of all rows into the probabilities of all rows but the first.
void Gate::softmax(double * out) const noexcept {
    const double largest = *std::max_element(out, out + n_rows_);
    double sum = 0.0;
    for (std::size_t k = 0; k < n_rows_; ++k) {
        out[k] = std::exp(out[k] - largest);
        sum += out[k];
    }
    for (std::size_t k = 0; k < n_categories(); ++k) {
        out[k] = out[k + 1] / sum;
    }
}

// Turns r of all rows into the scores, and the ranks: the lead of each category with its allowance.
void Gate::margins(double * out, double * ranks) const noexcept {
    const double harm = -out[0];
    const double * r = out + 1;
    std::size_t best = 0;
    double second = -std::numeric_limits<double>::infinity();
    for (std::size_t k = 1; k < n_categories(); ++k) {
        if (r[k] > r[best]) {
            second = r[best];
            best = k;
        } else {
            second = std::max(second, r[k]);
        }
    }
    for (std::size_t k = 0; k < n_categories(); ++k) {
        const double ahead = n_categories() == 1 ? 0.0 : r[k] - (k == best ? second : r[best]);
        ranks[k] = ahead + allowances_[k];
    }
    for (std::size_t k = 0; k < n_categories(); ++k) {
        out[k] = std::min(harm, ranks[k]);
    }
}

void Gate::scores(const double * h, double * out, double * ranks) const noexcept {
    for (std::size_t k = 0; k < n_rows_; ++k) {
        const double * row = weights_.data() + k * width();
        switch (kind_) {
            case Kind::margin:
            case Kind::multinomial:
            case Kind::probe:
                out[k] = dot(h, row, width()) + offsets_[k];
                break;
            case Kind::centroid:
                out[k] = cosine(h, row);
                break;
            case Kind::cast:
                out[k] = condition(h, row);
                break;
        }
    }
    if (kind_ == Kind::margin) {
        return margins(out, ranks);
    }
    if (kind_ == Kind::multinomial) {
        softmax(out);
    }
    std::copy(out, out + n_categories(), ranks);
}

}  // namespace pysteer
