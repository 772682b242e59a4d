"""A linear memory's step in C++, one pass over the weights: compiled when asked for, never before.

`build()` takes about a minute and a C++ compiler the first time; torch keeps the result in its
own folder of extensions. What it gives stands in for `nested.held.linear_` (its readable twin):
`memory.step_(x, held, kernel=build())`. float32 on the CPU; a user's matrix stays in the first
cache between its read and its write, so the gate and the second pass cost no traffic.
"""

from typing import Any

from torch import Tensor
from torch.utils import cpp_extension

from nested.held import Linear
from nested.linear import Parts

SOURCE = r"""
#include <torch/extension.h>
#include <ATen/Parallel.h>
#include <vector>

// w (N, D, E), scale (N, 1), qk (N, 2, D), value (N, E), gates (N, 1 or 2): changes w and scale
std::vector<at::Tensor> step(at::Tensor w, at::Tensor scale, at::Tensor qk, at::Tensor value,
                             at::Tensor gates, int64_t erase) {
  const int64_t n = w.size(0), d = w.size(1), e = w.size(2), g = gates.size(1);
  auto read = at::empty({n, e}, w.options()), error = at::empty({n, e}, w.options());
  float* W = w.data_ptr<float>();
  float* S = scale.data_ptr<float>();
  const float *QK = qk.data_ptr<float>(), *V = value.data_ptr<float>();
  const float* G = gates.data_ptr<float>();
  float *R = read.data_ptr<float>(), *X = error.data_ptr<float>();
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> write(e);
    for (int64_t u = begin; u < end; ++u) {
      float* __restrict__ m = W + u * d * e;
      float* __restrict__ r = R + u * e;
      float* __restrict__ x = X + u * e;
      float* __restrict__ p = write.data();
      const float *q = QK + u * 2 * d, *k = q + d, *v = V + u * e;
      const float beta = G[u * g], keep = S[u] * (g > 1 ? G[u * g + 1] : 1.0f);
      float overlap = 0.0f;
      for (int64_t j = 0; j < e; ++j) r[j] = x[j] = 0.0f;
      for (int64_t i = 0; i < d; ++i) {
        const float qi = q[i], ki = k[i];
        const float* row = m + i * e;
        overlap += qi * ki;
        for (int64_t j = 0; j < e; ++j) { r[j] += qi * row[j]; x[j] += ki * row[j]; }
      }
      for (int64_t j = 0; j < e; ++j) {
        x[j] = v[j] - keep * x[j];
        p[j] = beta * (erase ? x[j] : v[j]);
        r[j] = keep * r[j] + overlap * p[j];
      }
      for (int64_t i = 0; i < d; ++i) {
        const float ki = k[i];
        float* row = m + i * e;
        for (int64_t j = 0; j < e; ++j) row[j] = keep * row[j] + ki * p[j];
      }
      S[u] = 1.0f;
    }
  });
  return {read, error};
}
"""


def build() -> Linear:
    """Compile the kernel, or find it compiled. Raises RuntimeError where no compiler works."""
    module: Any = cpp_extension.load_inline(
        name="nested_linear",
        cpp_sources=SOURCE,
        functions=["step"],
        extra_cflags=["-O3", "-march=native"],
    )

    def linear_(
        layers: tuple[Tensor, ...], scale: Tensor, p: Parts, *, erase: int
    ) -> tuple[Tensor, Tensor]:
        (w,) = layers
        if any(x.device.type != "cpu" or x.dtype != scale.dtype for x in (w, *p)):
            raise TypeError(f"the kernel takes float32 on the CPU, not {w.dtype} on {w.device}")
        rows = (x.contiguous() for x in (p.qk, p.value, p.gates))
        read, error = module.step(w, scale, *rows, erase)
        return read, error

    return linear_
