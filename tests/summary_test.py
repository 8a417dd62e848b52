"""Tests of the table of leaves."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import marks as marks_lib

PARAMS = {'bias': jnp.array([1., 0., 2., 3.]), 'kernel': jnp.ones((2, 4)),
          'other': jnp.ones((4, 3))}
# Levels of `kernel` before, and after a refresh.
OLD = [[2, 2, 2, 2], [1, 1, 0, 0]]
NEW = [[2, 2, 0, 0], [2, 2, 1, 0]]


def hand_made():
  """Two of four of A are new; six entries were ever in A; `other` is 1 of 4."""
  marks = marks_lib.mark(jnp.array(OLD, jnp.uint8))
  marks = marks_lib.mark(jnp.array(NEW, jnp.uint8), marks)
  other = jnp.zeros((4, 3), jnp.uint8).at[0].set(2)
  state = sparse_jax.static(.5).init(PARAMS)
  return state._replace(
      step=jnp.int32(1), refreshed=jnp.bool_(True),
      marks={'bias': None, 'kernel': marks, 'other': marks_lib.mark(other)})


class SummarizeTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.method = sparse_jax.static(.5)
    self.table = sparse_jax.summarize(PARAMS, hand_made(), self.method)

  def test_rows_have_the_numbers_of_the_masks(self):
    bias, kernel, other = self.table.rows
    self.assertEqual(kernel[:8], ('kernel', (2, 4), 8, True, 4 / 8, 5 / 8,
                                  2 / 4, 6 / 8))
    self.assertEqual(other[:8], ('other', (4, 3), 12, True, 3 / 12, 3 / 12, 0.,
                                 3 / 12))
    self.assertEqual(bias[:5], ('bias', (4,), 4, False, 3 / 4))
    self.assertEqual(bias.churn, 0.)

  def test_total_is_over_the_sparse_leaves(self):
    self.assertEqual(self.table.total[:8], (
        'total', (), 20, True, 7 / 20, 8 / 20, 2 / 7, 9 / 20))
    self.assertAlmostEqual(self.table.sparsity, 13 / 20)

  def test_flips_are_counted_both_ways(self):
    bias, kernel, other = self.table.rows
    self.assertEqual((bias.flipped, kernel.flipped, other.flipped),
                     (0., 4 / 8, 0.))
    self.assertEqual(self.table.total.flipped, 4 / 20)

  def test_dead_lines_and_collapse_are_read_off_the_masks(self):
    """Two columns of `kernel` have no weight; `other` is one row of four."""
    bias, kernel, other = self.table.rows
    self.assertEqual([(row.dead_outputs, row.dead_inputs, row.collapsed)
                      for row in (bias, kernel, other)],
                     [(0, 0, False), (2, 0, False), (0, 3, True)])
    self.assertEqual(self.table.collapsed, ('other',))
    self.assertIsNone(self.table.effective_sparsity)

  def test_with_a_function_only_weights_on_a_path_count(self):
    """`other` reads the last row alone, which two columns of 0 feed: none."""
    def fn(weights, x):
      return jax.nn.relu(x @ weights['kernel']) @ weights['other']
    state = hand_made()
    other = jnp.zeros((4, 3), jnp.uint8).at[3].set(2)
    state = state._replace(marks=state.marks | {
        'other': marks_lib.mark(other)})
    for inputs in ((jnp.ones((1, 2)),),
                   (jax.ShapeDtypeStruct((1, 2), jnp.float32),)):
      table = sparse_jax.summarize(PARAMS, state, self.method, fn=fn,
                                   inputs=inputs)
      self.assertEqual(table.effective_sparsity, 1.)
      self.assertEqual(table.collapsed, ('kernel', 'other'))
      self.assertEqual(table.rows[1].dead_outputs, 4)
    self.assertIn('effective', str(table))
    whole = sparse_jax.summarize(PARAMS, hand_made(), self.method, fn=fn,
                                 inputs=inputs)
    # One unit is left: two weights lead to it and three away.
    self.assertEqual(whole.total.effective_density, 5 / 20)
    self.assertIsNone(whole.rows[0].effective_density)

  def test_the_function_is_traced_once(self):
    traces = []

    def fn(weights, x):
      traces.append(1)
      return x @ weights['kernel'] @ weights['other']
    for _ in range(3):
      sparse_jax.summarize(PARAMS, hand_made(), self.method, fn=fn,
                           inputs=(jnp.ones((1, 2)),))
    self.assertLen(traces, 1)

  def test_layers_of_a_stack_are_counted_apart(self):
    method = sparse_jax.static(.5, batch_axes=(0,))
    params = {'w': jnp.ones((2, 3, 4))}
    level = jnp.zeros((2, 3, 4), jnp.uint8).at[0].set(2).at[1, 0, 0].set(2)
    state = method.init(params)._replace(marks={'w': marks_lib.mark(level)})
    row, = sparse_jax.summarize(params, state, method).rows
    self.assertEqual((row.dead_outputs, row.dead_inputs, row.collapsed),
                     (3, 2, True))

  def test_blocks_are_counted_by_entry(self):
    method = sparse_jax.packed(sparse_jax.static(
        .5, structure=sparse_jax.Block((2, 2))))
    params = {'w': jnp.arange(32.).reshape(4, 8)}
    params, state = sparse_jax.start(sparse_jax.sparsify(
        optax.sgd(.1), method), method, params)
    table = sparse_jax.summarize(
        params, state, method, fn=lambda weights, x: x @ weights['w'],
        inputs=(jnp.ones((1, 4)),))
    mask = np.asarray(sparse_jax.get_state(state).forward_masks['w'])
    self.assertEqual(table.rows[0].dead_outputs, (~mask.any(0)).sum())
    self.assertEqual(table.rows[0].dead_inputs, (~mask.any(1)).sum())
    self.assertEqual(table.effective_sparsity, .5)

  def test_prints_one_line_for_each_leaf(self):
    lines = str(self.table).splitlines()
    self.assertLen(lines, 5)
    self.assertEqual(lines[0].split(), [
        'leaf', 'shape', 'entries', 'forward', 'backward', 'churn', 'ever',
        'active', 'dead'])
    self.assertEqual(lines[1].split(), ['bias', '4', '4', 'dense'])
    self.assertEqual(lines[2].split(), [
        'kernel', '2', 'x', '4', '8', '50.00%', '62.50%', '50.00%', '75.00%',
        '2', '+', '0'])
    self.assertEqual(lines[4].split(), [
        'total', '20', '35.00%', '40.00%', '28.57%', '45.00%',
                      '2', '+', '3'])

  def test_rows_are_dictionaries_for_a_file(self):
    rows = self.table.as_dicts()
    self.assertEqual([row['path'] for row in rows],
                     ['bias', 'kernel', 'other', 'total'])
    self.assertEqual(rows[1]['forward_density'], .5)
    self.assertEqual(set(rows[0]), set(rows[-1]))

  def test_a_dense_model_has_no_sparse_leaf(self):
    method = sparse_jax.dense()
    table = sparse_jax.summarize(PARAMS, method.init(PARAMS), method)
    self.assertFalse(any(row.sparse for row in table.rows))
    self.assertEqual(table.sparsity, 0.)
    self.assertIn('dense', str(table))

  def test_reads_any_optax_state_that_contains_the_method(self):
    tx = optax.chain(optax.clip(1.), sparse_jax.sparsify(optax.sgd(.1),
                                                         self.method))
    table = sparse_jax.summarize(PARAMS, tx.init(PARAMS), self.method)
    self.assertEqual([row.forward_density for row in table.rows[1:]],
                     [.5, .5])

  def test_churn_and_coverage_of_a_run(self):
    """Random growth: the union of the masks is what was ever active."""
    method = sparse_jax.set_(.75, update_every=1, drop_fraction=.5)
    params = {'w': jnp.asarray(
        np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    state = method.init(params)
    refresh = jax.jit(method.refresh)
    old = ever = np.asarray(state.forward_masks['w'])
    for _ in range(3):
      params, state = refresh(params, params, state)
      new = np.asarray(state.forward_masks['w'])
      ever = ever | new
      row, = sparse_jax.summarize(params, state, method).rows
      self.assertEqual(row.churn, (new & ~old).sum() / 16)
      self.assertEqual(row.ever_active, ever.sum() / 64)
      old = new


if __name__ == '__main__':
  absltest.main()
