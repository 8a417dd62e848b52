"""Which leaves follow which method: groups, patterns, what is no kernel."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from tests.clients import laws

BLOCK = laws.BLOCK
INPUTS = jax.random.normal(jax.random.key(0), (16, 8))


class GroupTest(parameterized.TestCase):

  def params(self):
    keys = jax.random.split(jax.random.key(2), 3)
    return {name: {'kernel': jax.random.normal(key, (8, 8))}
            for name, key in zip('abc', keys)}

  def test_each_leaf_follows_the_first_method_that_names_it(self):
    methods = {'a/': sparse_jax.top_kast(.75, backward_sparsity=.5,
                                         update_every=2),
               'b/': sparse_jax.packed(sparse_jax.rigl(
                   .5, structure=BLOCK, update_every=3))}
    method = sparse_jax.group(methods)
    tx = sparse_jax.sparsify(optax.adam(.01), method)
    params, state = sparse_jax.start(tx, method, self.params())
    self.assertEqual(params['b']['kernel'].blocks.shape, (2, 4, 4))

    def model(params, x):
      for name in 'abc':
        x = jnp.tanh(x @ params[name]['kernel'])
      return x

    @jax.jit
    def step(params, state):
      def loss_fn(params):
        return jnp.mean(sparse_jax.with_method(model, method, state)(
            params, INPUTS)**2)

      updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      return optax.apply_updates(params, updates), state

    for count in range(1, 5):
      params, state = step(params, state)
      seen = sparse_jax.get_state(state)
      self.assertEqual({path: bool(due) for path, due in
                        seen.refreshed.items()},
                       {'a/kernel': count % 2 == 0, 'b/kernel': count % 3 == 0})
      self.assertEqual(int(seen.forward_masks['a']['kernel'].sum()), 16)
      self.assertEqual(int(seen.backward_masks['a']['kernel'].sum()), 32)
      self.assertEqual(int(seen.forward_masks['b']['kernel'].sum()), 32)
      self.assertIsNone(seen.forward_masks['c']['kernel'])
    self.assertEqual(step._cache_size(), 1)

  def test_one_method_for_all_is_the_method(self):
    kept = []
    for method in (sparse_jax.top_kast(.75, backward_sparsity=.5),
                   sparse_jax.group({'.*': sparse_jax.top_kast(
                       .75, backward_sparsity=.5)})):
      tx = sparse_jax.sparsify(optax.adam(.01), method)
      params, state = self.params(), tx.init(self.params())
      updates, state = jax.jit(tx.update)(params, state, params)
      kept.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *kept)

  def test_leaves_of_two_methods_are_drawn_apart(self):
    method = sparse_jax.group({'a/': sparse_jax.static(.5),
                               'b/': sparse_jax.static(.5)})
    masks = method.init(self.params()).forward_masks
    self.assertFalse(np.array_equal(masks['a']['kernel'], masks['b']['kernel']))

  def test_each_method_parametrizes_its_own_leaves(self):
    alone = sparse_jax.powerprop(sparse_jax.static(.5))
    method = sparse_jax.group({'a/': alone, 'b/': sparse_jax.static(.5)})
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    params, state = sparse_jax.start(tx, method, self.params())
    read, masks = method.read(params, state), state.sparse.forward_masks
    for name in 'ab':
      np.testing.assert_allclose(
          read[name]['kernel'], np.where(masks[name]['kernel'],
                                         self.params()[name]['kernel'], 0),
          rtol=1e-5)
    np.testing.assert_array_equal(
        params['a']['kernel'], alone.parametrize(self.params())['a']['kernel'])

  def test_a_group_may_hold_a_group(self):
    inner = {'a/': sparse_jax.rigl(.5, update_every=1),
             'b/': sparse_jax.top_kast(.75, backward_sparsity=.5)}
    got = []
    for methods in (inner, {'a/|b/': sparse_jax.group(inner)}):
      method = sparse_jax.group(methods)
      tx = sparse_jax.sparsify(optax.sgd(.1), method, key=1)
      params, state = self.params(), tx.init(self.params())
      updates, state = jax.jit(tx.update)(params, state, params)
      got.append((sparse_jax.get_state(state).refreshed, jax.tree.map(
          lambda mask: int(mask.sum()), state.sparse.forward_masks),
                  method.read(params, state)['c']))
    jax.tree.map(np.testing.assert_array_equal, *got)

  @parameterized.parameters(
      ({}, 'not empty'), ({'(': sparse_jax.dense()}, 'regular'),
      ({'.*': sparse_jax.str_()}, 'str_'), ({'.*': None}, 'None'),
      ({'.*': sparse_jax.rigl(.5, skip_step=True)}, 'rigl'))
  def test_what_cannot_be_grouped_is_named(self, methods, text):
    with self.assertRaisesRegex(ValueError, text):
      sparse_jax.group(methods)

  def test_a_pattern_without_leaves_is_an_error(self):
    method = sparse_jax.group({'.*': sparse_jax.static(.5),
                               'b': sparse_jax.static(.5)})
    with self.assertRaisesRegex(ValueError, '\'b\''):
      method.init(self.params())


class ChoiceTest(parameterized.TestCase):

  def test_what_is_no_kernel_is_dense_by_default(self):
    params = {'embed': {'embedding': jnp.ones((8, 4))},
              'pos_embedding': jnp.ones((1, 5, 4)), 'cls': jnp.ones((1, 1, 4)),
              'pool': {'probe': jnp.ones((1, 1, 4))},
              'mlp': {'kernel': jnp.ones((4, 4))}}
    plan = sparse_jax.static(.5).init(params).plan
    self.assertEqual(list(plan.by_path), ['mlp/kernel'])
    plan = sparse_jax.static(.5, is_sparse={'embedding$': True}
                             ).init(params).plan
    self.assertIn('embed/embedding', plan.by_path)

  def test_patterns_name_axes_and_sparsities(self):
    params = {'scan': {'kernel': jnp.ones((3, 8, 4))},
              'head': {'kernel': jnp.ones((8, 6))}}
    state = sparse_jax.static(
        .5, batch_axes={'scan': (0,)}, allocation={'head': .75, '.*': .5},
        contracting={'head': (1,)}).init(params)
    masks = state.forward_masks
    np.testing.assert_array_equal(masks['scan']['kernel'].sum((1, 2)), 16)
    self.assertEqual(int(masks['head']['kernel'].sum()), 12)
    self.assertEqual(state.plan.by_path['head/kernel'].layout.rows, (1,))

  def test_description_says_what_is_kept_before_anything_is_made(self):
    method = sparse_jax.packed(sparse_jax.rigl(.75, structure=BLOCK))
    shapes = {'a': {'kernel': jax.ShapeDtypeStruct((16, 16), jnp.float32)}}
    row, = sparse_jax.describe(method, shapes).rows
    self.assertEqual((row.groups, row.kept), (16, .25))
    self.assertEqual(row.bytes, 4 * 4 * 16)

  def test_description_warns_of_wrong_axes_and_of_what_is_no_kernel(self):
    method = sparse_jax.rigl(.5, structure=BLOCK,
                             is_sparse=lambda path, leaf: True)
    params = {'w': jnp.ones((8, 8)), 'embedding': jnp.ones((8, 8))}
    text = str(sparse_jax.describe(
        method, params, fn=lambda params, x: x @ params['w'].T,
        inputs=(INPUTS,)))
    self.assertIn('\'embedding\' looks like no kernel', text)
    self.assertIn('\'w\' is summed over its axes', text)


if __name__ == '__main__':
  absltest.main()
