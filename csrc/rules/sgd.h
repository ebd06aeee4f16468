// Inner SGD with momentum, as torch.optim.SGD has it: a param group's record, and the step.
#pragma once

#include <tuple>

#include "host_device.h"
#include "rules/field.h"

namespace cts {

// Hyper-parameters of one param group as the user gave them.
struct SgdGroup {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  double meta_lr, shift;
};

// The order in which Python packs them.
inline constexpr std::tuple SGD_FIELDS{
    Field{"lr", &SgdGroup::lr},
    Field{"momentum", &SgdGroup::momentum},
    Field{"dampening", &SgdGroup::dampening},
    Field{"weight_decay", &SgdGroup::weight_decay},
    Field{"nesterov", &SgdGroup::nesterov},
    Field{"maximize", &SgdGroup::maximize},
    Field{"meta_lr", &SgdGroup::meta_lr},
    Field{"shift", &SgdGroup::shift},
};

inline namespace CTS_ISA {

// theta <- theta - lr u, v <- mu v + (1 - dampening) d, with d = +-g + lambda theta, u = v (Nesterov: d + mu v; no
// momentum: d). started: v has taken a gradient before; the first one enters undamped.
template <class V, class Rule> CTS_HD void inner_update(V& theta, V& v, V g, bool started, const Rule& r) {
  V d = r.maximize ? -g : g;
  if (r.has_weight_decay) d = fused(V(r.weight_decay), theta, d);
  V u = d;
  if (r.has_momentum) {
    v = started ? fused(V(r.gain), d, V(r.momentum) * v) : d;
    u = r.nesterov ? fused(V(r.momentum), v, d) : v;
  }
  theta = fused(V(r.descent), u, theta);
}

}  // namespace CTS_ISA
}  // namespace cts
