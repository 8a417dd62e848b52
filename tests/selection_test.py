"""Tests of which leaves may be sparse, and along which axes they contract."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp

from sparse_jax.masks import selection


def shapes(**sizes):
  return {name: jax.ShapeDtypeStruct(size, jnp.float32)
          for name, size in sizes.items()}


class IsKernelTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('matrix', 'Dense_0/kernel', (3, 4), jnp.float32, True),
      ('bare', '', (3, 4), jnp.float32, True),
      ('bfloat16', 'w', (3, 4), jnp.bfloat16, True),
      ('integer', 'w', (3, 4), jnp.int32, False),
      ('vector', 'w', (4,), jnp.float32, False),
      ('bias_of_heads', 'query/bias', (2, 4), jnp.float32, False),
      ('scale', 'norm/scale', (2, 4), jnp.float32, False),
      ('not_quite_bias', 'unbias', (2, 4), jnp.float32, True),
      ('below_bias', 'bias/kernel', (2, 4), jnp.float32, True))
  def test_takes_floating_matrices_that_are_no_bias(self, path, shape, dtype,
                                                    want):
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    self.assertIs(selection.is_kernel(path, leaf), want)

  def test_stacked_axes_do_not_count(self):
    leaf = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    self.assertFalse(selection.is_kernel('w', leaf, (0,)))


class SelectTest(parameterized.TestCase):

  def test_the_first_rule_that_is_found_decides(self):
    params = {'stem': shapes(kernel=(3, 4)), 'head': shapes(kernel=(4, 2),
                                                            bias=(2,))}
    rules = [('stem', False), ('head/bias', True), ('kernel', True)]
    self.assertEqual(list(selection.select(params, rules)),
                     ['head/bias', 'head/kernel'])

  def test_leaves_without_a_rule_follow_the_default(self):
    params = shapes(a=(3, 4), b=(3, 4), bias=(3, 4))
    self.assertEqual(list(selection.select(params, [('a', False)])), ['b'])

  def test_a_predicate_decides_alone(self):
    params = shapes(a=(3, 4), bias=(5,))
    chosen = selection.select(params, lambda path, leaf: leaf.ndim == 1)
    self.assertEqual(list(chosen), ['bias'])

  def test_a_leaf_without_entries_is_not_selected(self):
    params = shapes(a=(3, 4), none=(0, 4))
    for is_sparse in (None, {'.*': True}):
      self.assertEqual(list(selection.select(params, is_sparse)), ['a'])

  def test_a_rule_found_nowhere_is_named(self):
    with self.assertRaisesRegex(ValueError, '`is_sparse`.*typo'):
      selection.select(shapes(a=(3, 4)), [('typo', False), ('a', True)])

  @parameterized.parameters(([('a', False)],), (lambda path, leaf: False,))
  def test_nothing_selected_is_an_error(self, is_sparse):
    with self.assertRaisesRegex(ValueError, '`is_sparse`.*selects no leaf'):
      selection.select(shapes(a=(3, 4)), is_sparse)

  def test_a_vector_of_each_stacked_layer_is_no_matrix(self):
    params = shapes(kernel=(2, 3, 4), gain=(2, 4), shift=(2,))
    chosen = selection.select(params, batch_axes=(0,))
    self.assertEqual(list(chosen), ['kernel'])

  @parameterized.parameters(((0,),), ((1,),), ((2,),), ((-1,),), ((-3,),))
  def test_stacked_axes_skip_leaves_that_lack_them(self, axes):
    params = shapes(kernel=(3, 4, 5), bias=(5,))
    self.assertEqual(list(selection.select(params, batch_axes=axes)),
                     ['kernel'])

  def test_stacked_axes_may_depend_on_the_leaf(self):
    params = shapes(blocks=(2, 3, 4), head=(3, 4), pairs=(2, 3))
    axes = lambda path, leaf: (0,) if path in ('blocks', 'pairs') else ()
    self.assertEqual(list(selection.select(params, batch_axes=axes)),
                     ['blocks', 'head'])


class ContractingAxesTest(parameterized.TestCase):

  @parameterized.parameters(
      ('Dense_0/kernel', 2, (0,)), ('Conv_0/kernel', 4, (2,)),
      ('Conv_0/kernel', 3, (1,)), ('kernel', 2, (0,)), ('', 2, (0,)),
      ('attention/query/kernel', 3, (0,)), ('attention/key/kernel', 3, (0,)),
      ('attention/value/kernel', 3, (0,)), ('attention/out/kernel', 3, (0, 1)),
      ('mlp/out/kernel', 2, (0,)), ('mlp/out/kernel', 4, (2,)))
  def test_axes_of_the_layers_of_flax(self, path, ndim, want):
    self.assertEqual(selection.contracting_axes(path, ndim), want)


if __name__ == '__main__':
  absltest.main()
