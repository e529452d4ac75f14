// Steering inside the uncut graph: llama.cpp adds its control-vector tensors by itself, to all rows alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "batch.hpp"
#include "sites.hpp"
#include "steer.hpp"

namespace pysteer {

// True if the tensors can express the steering of a batch: the same additions to the residual of layers >= 1 for every
// row. Throws std::invalid_argument if they cannot and a plan insists.
bool fits_control_vector(const Batch & batch);

// The values of llama.cpp's control-vector tensors.
class ResidentVectors {
  public:
    // Before a probe, which fills the tensors with markers.
    void resize(std::size_t n_layer, std::size_t n_embd);
    // Writes the additions that every row of a batch gets. The batch must fit and have an active place.
    void write(const SiteMap & sites, const Batch & batch, Steerer & steerer);
    void write_zeros(const SiteMap & sites);

  private:
    void set(const SiteMap & sites, std::size_t layer, const float * values);

    std::vector<float> zeros_;
    std::vector<bool> nonzero_;  // by layer
    // The plan that was written, and Sequence::key() of the rows; null: zeros.
    std::shared_ptr<const Plan> plan_;
    uint64_t key_ = 0;
};

}  // namespace pysteer
