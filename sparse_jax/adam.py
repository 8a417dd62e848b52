"""Adam with one age a parameter entry, so that entries may start anew."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax import checks

_OLDEST = 2**16 - 1


class ScaleByAgedAdamState(NamedTuple):
  """State of `scale_by_aged_adam`."""

  # int32[], updates so far.
  count: jax.Array  # type: ignore[assignment]
  mu: Any  # First and second moments, trees like the parameters.
  nu: Any
  age: Any  # uint16, updates since an entry was new; stays at the largest.


def scale_by_aged_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, mu_dtype: Any = None, *, warmup_steps: int = 0,
) -> optax.GradientTransformation:
  """Rescales updates as Adam does, correcting each entry's bias by its age.

  `optax.scale_by_adam` has one count for all. After moments of an entry are
  made anew (as `sparsify` does when the entry grows) the count is that of an
  old one, so that the first update is (1 - b1) / sqrt(1 - b2) = 3.2 times what
  it should be. Here the age is made anew with the moments. It takes two bytes
  an entry; an entry of 65,535 updates or more is corrected by the count.

  Law: as long as no slot has been made anew, it is `optax.scale_by_adam`, bit
  for bit if both are compiled on a CPU, else but for rounding. And an entry
  whose slots have been made anew gets, with `warmup_steps=0`, the updates that
  a new optimizer would give it.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the denominator outside of the root.
    eps_root: added inside the root.
    mu_dtype: dtype of the first moment; None is that of the parameters.
    warmup_steps: updates over which an entry made anew gains its full step:
      the update is scaled by min(age / warmup_steps, 1), where the age is 1 at
      the first (SMET: 100). 0 is at once. Entries as old as the optimizer are
      not scaled.

  Returns:
    An Optax transformation.

  Example:
    >>> tx = scale_by_aged_adam()
    >>> params = {'kernel': jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...   updates, state = tx.update({'kernel': jnp.ones(2)}, state)
    >>> new = jnp.array([True, False])  # What sparsify does, say to the first.
    >>> state = state._replace(**{
    ...     name: {'kernel': jnp.where(new, 0, getattr(state, name)['kernel'])}
    ...     for name in ('mu', 'nu', 'age')})
    >>> updates, state = tx.update({'kernel': jnp.ones(2)}, state)
    >>> updates['kernel'].round(3)  # optax.scale_by_adam's first is 0.977.
    Array([1., 1.], dtype=float32)

  Reference:
    SMET, 2026, https://arxiv.org/abs/2606.00888, the bias correction by age
    and the warm-up of 100 steps. Its division of the learning rate by a
    leaf's density is left to the caller.
  """
  checks.check_count('warmup_steps', warmup_steps, least=0)

  def init_fn(params):
    return ScaleByAgedAdamState(
        count=jnp.zeros([], jnp.int32),
        mu=optax.tree.zeros_like(params, dtype=mu_dtype),
        nu=optax.tree.zeros_like(params),
        age=optax.tree.zeros_like(params, dtype=jnp.uint16))

  def update_fn(updates, state, params=None):
    del params
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    count = optax.safe_increment(state.count)
    age = jax.tree.map(optax.safe_increment, state.age)

    def rescale(mean, square, age):
      anew = (age < _OLDEST) & (age.astype(jnp.int32) != count)
      years = age.astype(jnp.float32)

      def unbiased(moment, decay):
        # The power of one number where it does, which Optax takes.
        bias = jnp.where(anew, 1 - decay**years, 1 - decay**count)
        return moment / bias.astype(moment.dtype)

      update = unbiased(mean, b1) / (
          jnp.sqrt(unbiased(square, b2) + eps_root) + eps)
      if not warmup_steps:
        return update
      share = jnp.where(anew, jnp.minimum(years / warmup_steps, 1.), 1.)
      return update * share.astype(update.dtype)

    # As Optax takes its powers, of a number by an integer.
    with jax.numpy_dtype_promotion('standard'):
      updates = jax.tree.map(rescale, mu, nu, age)
    mu = optax.tree.cast(mu, mu_dtype)
    nu = optax.tree.cast_like(nu, state.nu)
    return updates, ScaleByAgedAdamState(count, mu, nu, age)

  return optax.GradientTransformation(init_fn, update_fn)


def aged_adam(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-8, eps_root: float = 0.0, mu_dtype: Any = None, *,
    warmup_steps: int = 0) -> optax.GradientTransformationExtraArgs:
  """`optax.adam` for weights that grow: the bias is corrected by entry.

  `optax.adam` has one count of updates for all entries. When a weight grows,
  `sparsify` makes its moments anew, and by the old count its first update would
  be 3.2 times what it should be, were it not bounded. Here the age of each
  entry is made anew with its moments; that takes two bytes an entry.

  Law: as long as no entry has grown it is `optax.adam`, up to rounding; an
  entry that has just grown gets, with `warmup_steps=0`, what a new optimizer
  would give it.

  Args:
    learning_rate, b1, b2, eps, eps_root, mu_dtype: as of `optax.adam`.
    warmup_steps: updates over which an entry that has grown gains its full
      step: it is scaled by min(age / warmup_steps, 1), with an age of 1 at the
      first. 0 is at once.

  Returns:
    An Optax transformation.

  Raises:
    ValueError: if `warmup_steps` is below 0.

  Example:
    >>> import sparse_jax
    >>> tx = sparse_jax.sparsify(aged_adam(1e-3), sparse_jax.rigl(0.9))

  Reference:
    SMET, 2026, https://arxiv.org/abs/2606.00888.
  """
  return optax.chain(
      scale_by_aged_adam(b1, b2, eps, eps_root, mu_dtype,
                         warmup_steps=warmup_steps),
      optax.scale_by_learning_rate(learning_rate))


def aged_adamw(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-8, eps_root: float = 0.0, mu_dtype: Any = None,
    weight_decay: float = 1e-4, mask: Any = None, *, warmup_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.adamw` for weights that grow; see `aged_adam`.

  Args:
    learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask: as of
      `optax.adamw`.
    warmup_steps: as of `aged_adam`.

  Example:
    >>> tx = aged_adamw(1e-3, weight_decay=.1)
    >>> len(tx.init({'kernel': jnp.ones((2, 2))}))
    3
  """
  return optax.chain(
      scale_by_aged_adam(b1, b2, eps, eps_root, mu_dtype,
                         warmup_steps=warmup_steps),
      optax.add_decayed_weights(weight_decay, mask),
      optax.scale_by_learning_rate(learning_rate))
