#include "scope.hpp"

#include <cmath>

namespace pysteer {

float Scope::factor(int64_t p, int64_t n) const noexcept {
    const int64_t r = p - (n - 1);
    const bool within = r >= 0 && r < stop;
    const double part = within ? static_cast<double>(r) / static_cast<double>(stop) : 1.0;
    switch (kind) {
        case Kind::all:
            return 1.0f;
        case Kind::positions:
            return p >= start && p < stop ? 1.0f : 0.0f;
        case Kind::response:
            return r >= start && r < stop ? 1.0f : 0.0f;
        case Kind::linear:
            return within ? static_cast<float>(1.0 - part) : 0.0f;
        case Kind::cosine:
            return within ? static_cast<float>((1.0 + std::cos(3.14159265358979323846 * part)) / 2.0) : 0.0f;
        case Kind::values:
            return r >= 0 && static_cast<std::size_t>(r) < values.size() ? values[static_cast<std::size_t>(r)] : 0.0f;
    }
    return 0.0f;
}

}  // namespace pysteer
