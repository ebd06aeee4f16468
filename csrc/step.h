// Continual trajectory shifting (Shin et al., ICML 2021, Algorithm 2): the update rule, once, for host and device code.
//
// Every coordinate stands alone. A kernel loads theta, v and g of T tasks and phi at one coordinate, calls the four
// functions in their order, and stores; the order in which it walks over memory is free.
//
//     for every task t with a gradient:
//         inner_update(theta_t, v_t, g_t)                  theta_t <- theta_t - lr u_t
//     sum = (theta_0 - phi) + (theta_1 - phi) + ...        in the tasks' order, so that runs are bit-equal
//     delta = meta_update(phi, sum)                        phi <- phi + meta_lr (mean_t theta_t - phi)
//     for every task:
//         shift(theta_t, delta)                            or theta_t <- phi at a reset
//
// V is what one coordinate is held in: float or double, or a SIMD vector of them (csrc/cpu/vec.h). C is the scalar in
// it: double for float64 parameters, else float. `fused(a, b, c)` is a * b + c rounded once where the machine can;
// torch.optim.SGD rounds at the same places.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "rules/sgd.h"

namespace cts {

// One tensor of all rows: columns offset ... offset + numel of its buffers. Gradient of row r: entry `first + r` of the
// pointer table.
struct Segment {
  int64_t offset, numel;
  int32_t group;
  int32_t first;
};

// The buffers of one `Flat` (cts_fast/engine/layout.py) and where its tensors lie. Rows are `stride` elements apart,
// segments are padded with zeros to 128 bytes. phi: [S] of C, null for heads. theta, momentum: [rows, S] of the
// parameters' dtype. master: [rows, S] of float for bfloat16 and float16, else null.
struct Flat {
  void *phi, *theta, *momentum, *master;
  int64_t stride;
  int32_t rows;
  int32_t num_segments;
  const Segment* segments;
};

// What a step does besides the inner step. gradients, started, nonfinite: one entry for each row of each segment,
// Segment::first says where. A null gradient leaves the inner step out. started: momentum has taken its first gradient;
// null: all have. nonfinite: set to 1 where a gradient holds a NaN or an infinity; null: not looked for. num_tasks: T
// of the mean, which may be more than a buffer's rows.
struct Control {
  const void* const* gradients;
  const uint8_t* started;
  uint8_t* nonfinite;
  const SgdGroup* groups;
  double inverse_scale;
  int32_t num_tasks;
  bool meta_update, reset, reset_momentum;
};

inline namespace CTS_ISA {

// A group's numbers in the type that they are used in.
template <class C> struct Rule {
  // -lr, mu, 1 - dampening, lambda, meta_lr / T, shift, and g's factor
  C descent, momentum, gain, weight_decay, rate, shift, scale;
  bool has_momentum, has_weight_decay, nesterov, scaled, maximize, meta_update, reset, reset_momentum;
};

template <class C> CTS_HD Rule<C> make_rule(const SgdGroup& h, const Control& control, bool shared) {
  Rule<C> r;
  r.descent = C(-h.lr), r.momentum = C(h.momentum), r.gain = C(1 - h.dampening), r.weight_decay = C(h.weight_decay);
  r.rate = C(h.meta_lr / control.num_tasks), r.shift = C(h.shift), r.scale = C(control.inverse_scale);
  r.has_momentum = h.momentum != 0, r.has_weight_decay = h.weight_decay != 0, r.nesterov = h.nesterov;
  r.scaled = control.inverse_scale != 1, r.maximize = h.maximize;
  // meta_lr 0 moves nothing: tasks are then wholly apart
  r.meta_update = shared && control.meta_update && h.meta_lr != 0;
  r.reset = shared && control.reset, r.reset_momentum = r.reset && control.reset_momentum;
  return r;
}

// The gradient as the step sees it, before maximize: unscaled. Its finiteness is what `Control::nonfinite` reports.
template <class V, class C> CTS_HD V unscaled(V g, const Rule<C>& r) { return r.scaled ? g * V(r.scale) : g; }

// phi <- phi + delta, delta = meta_lr / T sum; returns delta. sum: of theta_t - phi over the tasks.
template <class V, class C> CTS_HD V meta_update(V& phi, V sum, const Rule<C>& r) {
  V delta = sum * V(r.rate);
  phi = phi + delta;
  return delta;
}

// theta <- theta + shift delta.
template <class V, class C> CTS_HD void shift(V& theta, V delta, const Rule<C>& r) {
  theta = fused(V(r.shift), delta, theta);
}

// The last three lines of the rule for T tasks held in registers.
template <int T, class V, class C> CTS_HD void meta_step(V (&theta)[T], V& phi, const Rule<C>& r) {
  if (r.meta_update) {
    V sum = theta[0] - phi;
    CTS_UNROLL
    for (int t = 1; t < T; ++t) sum = sum + (theta[t] - phi);
    V delta = meta_update(phi, sum, r);
    CTS_UNROLL
    for (int t = 0; t < T; ++t) shift(theta[t], delta, r);
  }
  if (r.reset) {
    CTS_UNROLL
    for (int t = 0; t < T; ++t) theta[t] = phi;
  }
}

}  // namespace CTS_ISA
}  // namespace cts
