"""Adam with ages: Optax's while nothing grows, a new one for what has grown."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import adam as aged_lib

METHODS = {name: method(update_every=25) for name, method in {
    'set_': functools.partial(sparse_jax.set_, .5),
    'rigl': functools.partial(sparse_jax.rigl, .5),
    'top_kast': functools.partial(sparse_jax.top_kast, .75,
                                  backward_sparsity=.5),
    'ac_dc': functools.partial(sparse_jax.ac_dc, .5)}.items()}
RATE = .01
# With these what is to be seen is seen after a hundred steps.
DECAYS = dict(b1=.8, b2=.99)


def fake_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {'dense': {'kernel': jnp.asarray(rng.normal(size=(8, 12)), dtype),
                    'bias': jnp.zeros(12, dtype)}}


def fake_grads(step, dtype=jnp.float32):
  """With a mean, as the first steps of an entry that has grown have."""
  rng = np.random.default_rng([1, step])
  return {'dense': {
      'kernel': jnp.asarray(1 + .3 * rng.normal(size=(8, 12)), dtype),
      'bias': jnp.asarray(rng.normal(size=12), dtype)}}


def run(tx, steps, *, dtype=jnp.float32, compile=True, start=0, carry=None):
  """The updates of some steps, and the parameters and the state after them."""
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params, grad_fn=lambda p: grads)
    return updates, optax.apply_updates(params, updates), state

  tx = optax.with_extra_args_support(tx)
  step = jax.jit(step) if compile else step
  params, state = carry or (fake_params(dtype), tx.init(fake_params(dtype)))
  made = []
  for i in range(start, start + steps):
    updates, params, state = step(params, state, fake_grads(i, dtype))
    made.append(jax.tree.map(np.array, updates))
  return made, (params, state)


@functools.cache
def largest_step(name, optimizer):
  """The largest ordinary update of a kernel, in learning rates."""
  tx = optimizer(RATE, **DECAYS)
  if name is not None:
    tx = sparse_jax.sparsify(tx, METHODS[name], bound_grown=False)
  return max(np.abs(updates['dense']['kernel']).max() / RATE
             for i, updates in enumerate(run(tx, 120)[0])
             if i > 0 and i % 25 < 24)  # Refreshes set weights to 0.


class AgedAdamTest(parameterized.TestCase):

  @parameterized.product(
      compile=(True, False), dtype=(jnp.float32, jnp.bfloat16),
      options=(dict(), dict(b1=.8, b2=.95, eps=1e-3, eps_root=1e-6),
               dict(mu_dtype=jnp.bfloat16),
               dict(learning_rate=optax.linear_schedule(.1, 0., 10))))
  def test_is_adam_while_nothing_grows(self, compile, dtype, options):
    """Bit for bit if compiled, with and without a warm-up."""
    equal = chex.assert_trees_all_equal if compile else functools.partial(
        chex.assert_trees_all_close,  # Of parameters that are sums.
        **dict.fromkeys(('rtol', 'atol'),
                        1e-5 if dtype == jnp.float32 else .02))
    options = dict(learning_rate=.05) | options
    plain, (want, _) = run(optax.adam(**options), 12, dtype=dtype,
                           compile=compile)
    for warmup_steps in (0, 100):
      aged, (got, state) = run(
          aged_lib.aged_adam(**options, warmup_steps=warmup_steps), 12,
          dtype=dtype, compile=compile)
      equal(plain, aged)
      equal(want, got)
      chex.assert_trees_all_equal_dtypes(plain, aged)
      self.assertEqual(int(state[0].age['dense']['kernel'].min()), 12)

  def test_is_adamw_while_nothing_grows(self):
    """And under a method that moves nothing."""
    method = sparse_jax.static(.5)
    chex.assert_trees_all_equal(*(
        run(sparse_jax.sparsify(make(.05, weight_decay=.1), method), 8)[0]
        for make in (aged_lib.aged_adamw, optax.adamw)))

  def test_an_entry_made_anew_gets_a_new_optimizers_updates(self):
    tx = aged_lib.aged_adam(RATE)
    _, (params, state) = run(tx, 200)
    fresh = tx.init(params)
    anew = np.random.default_rng(2).random((8, 12)) < .3
    mixed = jax.tree.map(lambda old, new: jnp.where(anew, new, old)
                         if old.shape == anew.shape else old, state, fresh)
    updates = [run(tx, 20, start=200, carry=(params, each))[0]
               for each in (state, fresh, mixed)]
    for old, new, both in zip(*updates):
      kernel = both['dense']['kernel']
      np.testing.assert_array_equal(kernel[~anew],
                                    old['dense']['kernel'][~anew])
      # Powers of whole arrays may be rounded otherwise than those of numbers.
      np.testing.assert_allclose(kernel[anew], new['dense']['kernel'][anew],
                                 rtol=2e-5)

  @parameterized.parameters(*METHODS)
  def test_first_steps_after_growth_are_no_larger_than_a_new_optimizers(
      self, name):
    if name != 'ac_dc':  # It renews the count with all slots.
      self.assertGreater(largest_step(name, optax.adam), 2)
    # Of plain Adam 2.5 and more; 1.21 to 1.23 were seen.
    self.assertLess(largest_step(name, aged_lib.aged_adam), 1.3)

  def test_warmup_scales_what_has_grown_alone(self):
    tx = sparse_jax.sparsify(aged_lib.aged_adam(RATE), METHODS['rigl'])
    slow = sparse_jax.sparsify(aged_lib.aged_adam(RATE, warmup_steps=4),
                               METHODS['rigl'])
    carry = run(tx, 25)[1]  # The last of these refreshed.
    grown = np.asarray(carry[1].inner[0].mu['dense']['kernel'] != 0)
    for i, (full, part) in enumerate(zip(*(
        run(each, 4, start=25, carry=carry)[0] for each in (tx, slow)))):
      full, part = (each['dense']['kernel'] for each in (full, part))
      inside = np.asarray(sparse_jax.get_state(
          carry[1]).backward_masks['dense']['kernel'])
      old = grown & inside
      np.testing.assert_array_equal(part[old], full[old])
      np.testing.assert_allclose(part[inside & ~old],
                                 full[inside & ~old] * (i + 1) / 4, rtol=1e-6)

  def test_oldest_entries_take_the_count(self):
    """Two bytes an entry; no age runs over."""
    tx = aged_lib.aged_adam(.1, b2=.99999)
    params = fake_params()
    (first, *rest) = tx.init(params)
    old = first._replace(
        count=jnp.int32(100_000), age=jax.tree.map(
            lambda age: jnp.full_like(age, 2**16 - 1), first.age))
    self.assertEqual(old.age['dense']['kernel'].dtype, jnp.uint16)
    updates, (after, *_) = jax.jit(tx.update)(
        fake_grads(0), (old, *rest), params)
    plain = optax.adam(.1, b2=.99999)
    (first, *rest) = plain.init(params)
    want, _ = jax.jit(plain.update)(fake_grads(0), (
        first._replace(count=jnp.int32(100_000)), *rest), params)
    chex.assert_trees_all_equal(updates, want)
    chex.assert_trees_all_equal(after.age, old.age)

  def test_shapes_are_known_without_computing(self):
    tx = sparse_jax.sparsify(aged_lib.aged_adam(RATE), METHODS['rigl'])
    shapes = jax.eval_shape(tx.init, fake_params())
    _, (_, state) = run(tx, 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)

  def test_a_state_restored_goes_on_alike(self):
    tx = sparse_jax.sparsify(aged_lib.aged_adam(RATE), METHODS['rigl'])
    made, _ = run(tx, 35)
    _, (params, state) = run(tx, 27)
    leaves, treedef = jax.tree.flatten((params, state))
    saved = [np.asarray(jax.random.key_data(leaf)) if jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)
        for leaf in leaves]
    restored = treedef.unflatten([
        jax.random.wrap_key_data(new) if jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(new)
        for leaf, new in zip(leaves, saved)])
    chex.assert_trees_all_equal(
        made[27:], run(tx, 8, start=27, carry=restored)[0])

  @parameterized.parameters(-1, 1.5, True)
  def test_impossible_warmup_is_named(self, steps):
    with self.assertRaisesRegex(ValueError, r'`warmup_steps` \(='):
      aged_lib.aged_adam(.1, warmup_steps=steps)


if __name__ == '__main__':
  absltest.main()
