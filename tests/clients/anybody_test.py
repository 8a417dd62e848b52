"""What was once silently wrong in somebody's model, on models of many kinds."""

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
from flax import nnx
import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import operators
from sparse_jax import trees
from sparse_jax.blocks import packing
from tests.clients import laws


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def shapes(**leaves):
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32)
          for name, shape in leaves.items()}


class Experts(nnx.Module):
  """Lists in lists in a dict."""

  def __init__(self, rngs):
    linear = lambda: nnx.Linear(6, 6, rngs=rngs)
    self.experts = nnx.Dict({
        'left': nnx.List([nnx.List([linear(), linear()]), nnx.List([])]),
        'right': nnx.List([nnx.List([linear()])])})
    self.norm = nnx.BatchNorm(6, rngs=rngs)

  def __call__(self, x):
    for side in ('left', 'right'):
      for tower in self.experts[side]:
        for layer in tower:
          x = jnp.tanh(layer(x))
    return self.norm(x)


class NnxTest(parameterized.TestCase):

  @parameterized.parameters(
      (sparse_jax.str_(initial=-4.), 'thresholds'),
      (sparse_jax.dst(), 'thresholds'), (sparse_jax.cs(), 'gates'))
  def test_what_is_learnt_stands_beside_nested_lists(self, method, key):
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    model, optimizer = sparse_jax.nnx_start(Experts(nnx.Rngs(0)), tx, method)
    self.assertLen(jax.tree.leaves(nnx.as_pure(nnx.state(
        getattr(model, key)))), 3)

    @nnx.jit
    def step(model, optimizer):
      grads = nnx.grad(lambda model: jnp.sum(jnp.square(
          sparse_jax.nnx_getter(method, optimizer)(model)(normal(0, 4, 6))
          - 1)))(model)
      optimizer.update(model, grads)

    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(
        getattr(model, key))))
    step(model, optimizer)
    after = nnx.as_pure(nnx.state(getattr(model, key)))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before,
                         after)
    self.assertGreater(max(jax.tree.leaves(moved)), 0)
    self.assertGreater(float(jnp.abs(model.norm.mean[...]).max()), 0)


class LeavesTest(parameterized.TestCase):

  @parameterized.parameters(
      'embedding', 'input_embedding', 'rel_embedding', 'embed', 'pos_emb',
      'posemb', 'pos_embed', 'pos_encoding', 'position', 'cls', 'cls_token',
      'mask_token', 'register_tokens', 'probe', 'bias', 'norm_scale', 'wpe',
      'wte', 'pe', 'pos_table', 'relative_position_bias_table', 'rpb',
      'registers', 'cls_tok', 'latents', 'prompt', 'gamma')
  def test_no_kernel_by_its_name(self, name):
    params = shapes(kernel=(4, 8), **{name: (1, 6, 8)})
    plan = sparse_jax.static(.5).init(
        jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)).plan
    self.assertEqual(list(plan.by_path), ['kernel'])

  @parameterized.parameters(
      'kernel', 'w', 'lora_a', 'weight', 'query', 'queries', 'post', 'wq',
      'recurrent_kernel', 'type', 'token_mixer_w')
  def test_a_kernel_by_its_name(self, name):
    plan = jax.eval_shape(sparse_jax.static(.5).init, shapes(
        **{name: (4, 8)})).plan
    self.assertEqual(list(plan.by_path), [name])

  @parameterized.parameters('batch_axes', 'contracting')
  def test_a_pattern_of_axes_that_is_found_nowhere_is_named(self, name):
    method = sparse_jax.rigl(.5, **{name: {'encodr': (0,)}})
    with self.assertRaisesRegex(ValueError, f'{name}.*encodr.*encoder'):
      jax.eval_shape(method.init, {'encoder': shapes(kernel=(4, 8))})

  def test_two_stacks_of_different_depth_and_plain_layers(self):
    params = {'lower': shapes(kernel=(2, 6, 8), gain=(2, 6)),
              'upper': {'mlp': shapes(kernel=(5, 8, 4))},
              'stem': shapes(kernel=(3, 3, 2, 8)), 'head': shapes(
                  kernel=(8, 10))}
    method = sparse_jax.rigl(.75, batch_axes={'^lower|^upper': (0,)})
    made = method.init(jax.tree.map(
        lambda leaf: normal(1, *leaf.shape), params))
    abstract = jax.eval_shape(method.init, params)
    masks = trees.leaves_by_path(made.forward_masks)
    self.assertEqual({path: mask.shape for path, mask in masks.items()},
                     {path: mask.shape for path, mask in trees.leaves_by_path(
                         abstract.forward_masks).items()})
    for path, each in (('lower/kernel', 12), ('upper/mlp/kernel', 8)):
      np.testing.assert_array_equal(masks[path].sum((1, 2)), each)
    self.assertEqual(int(masks['stem/kernel'].sum()), 36)
    self.assertEqual(int(masks['head/kernel'].sum()), 20)

  @parameterized.parameters(
      ({'x/y': {'z': (4, 4)}, 'x': {'y/z': (4, 4)}}, 'x/y/z'),
      ({'m': {'n': (2, 6)}, 'm/n': (6, 2)}, 'm/n'))
  def test_two_leaves_of_one_path_are_an_error(self, tree, path):
    params = jax.tree.map(lambda shape: jnp.ones(shape), tree,
                          is_leaf=lambda node: isinstance(node, tuple))
    with self.assertRaisesRegex(ValueError, f'one path.*{path}'):
      sparse_jax.static(.5).init(params)

  def test_growth_scores_stand_beside_blocks_in_a_box(self):
    blocks = packing.PackedBlocks(jnp.ones((1, 2, 2)), block=(2, 2),
                                  growth=jnp.zeros((2, 2)), shape=(4, 4))
    box = nn.Partitioned(blocks, names=('data', None))
    self.assertEqual(set(trees.leaves_by_path({'layer': {'kernel': box}})),
                     {'layer/kernel', 'layer/kernel/growth'})


class TreesTest(parameterized.TestCase):
  """Another tree, or another method's state, is an error wherever it goes."""

  def setUp(self):
    super().setUp()
    self.method = sparse_jax.top_kast(.75, backward_sparsity=.5)
    self.params = {'net': {'first': normal(1, 6, 8), 'second': normal(2, 8, 4)}}
    self.state = self.method.init(self.params)

  @parameterized.named_parameters(
      ('nested', lambda p: {'params': p}, 'net/first'),
      ('flat', lambda p: p['net'], 'net/first'),
      ('renamed', lambda p: {'net': {'first': p['net']['first'],
                                     'last': p['net']['second']}},
       'net/second'),
      ('transposed', lambda p: {'net': {**p['net'], 'first': p['net'][
          'first'].T}}, 'net/first'),
      ('less', lambda p: {'net': {'first': p['net']['first']}}, 'net/second'))
  def test_another_tree_is_an_error(self, change, path):
    changed = change(self.params)
    tx = sparse_jax.sparsify(optax.sgd(.1), self.method)
    opt_state = tx.init(self.params)
    door = sparse_jax.with_method(lambda p: p, self.method, self.state)
    calls = {'read': lambda: self.method.read(changed, self.state),
             'update': lambda: tx.update(changed, opt_state, changed)}
    if 'params' not in changed:  # That is a variables dict.
      calls['with_method'] = lambda: door(changed)
    for name, call in calls.items():
      with self.subTest(name), self.assertRaisesRegex(ValueError, path):
        call()

  def test_a_packed_state_is_not_that_of_the_masked_method(self):
    masked = sparse_jax.rigl(.5, structure=laws.BLOCK)
    packed = sparse_jax.packed(masked)
    params = {'kernel': normal(1, 8, 8)}
    state = jax.eval_shape(packed.init, params)
    with self.assertRaisesRegex(ValueError, r'packed\(rigl\).*rigl'):
      masked.read(params, state)
    with self.assertRaisesRegex(ValueError, r'rigl.*packed\(rigl\)'):
      packed.read(params, jax.eval_shape(masked.init, params))

  @parameterized.parameters('rigl', 'swat', 'str_', 'dense')
  def test_the_state_of_another_method_is_an_error(self, name):
    method = laws.METHODS[name]()
    params = method.parametrize(self.params)
    for reads in (method.read, sparse_jax.dense_weights):
      args = (params, self.state) if reads is method.read else (
          method, params, self.state)
      with self.assertRaisesRegex(ValueError, f'top_kast.*{name}'):
        reads(*args)

  def test_two_methods_are_two_patterns_of_a_group(self):
    tx = optax.multi_transform(
        {name: sparse_jax.sparsify(optax.sgd(.1), sparse_jax.rigl(sparsity))
         for name, sparsity in (('first', .5), ('second', .75))},
        {'net': {'first': 'first', 'second': 'second'}})
    with self.assertRaisesRegex(ValueError, r'group\({pattern: method}\)'):
      self.method.read(self.params, tx.init(self.params))


class OperatorsTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('swat', sparse_jax.swat(.5, allocation=sparse_jax.erk)),
      ('added', operators.add_operands(
          sparse_jax.dense(), operators.Operands(output_gradient=.5))))
  def test_reach_the_leaves_of_their_own_state_alone(self, method):
    params = {'mine': normal(1, 8, 12), 'other': normal(2, 12, 4)}
    tx = optax.masked(sparse_jax.sparsify(optax.sgd(.1), method),
                      {'mine': True, 'other': False})
    opt_state = tx.init(params)
    stated = method.operators(params, opt_state)
    alone = {'mine': params['mine']}
    self.assertEqual(stated, method.operators(alone, method.init(alone)))
    self.assertEqual(set(stated), {'mine'})


class OddlyNamed(nn.Module):
  """Axes that names would guess wrong."""

  @nn.compact
  def __call__(self, x):  # [batch, length, channels]
    x = nn.Conv(8, (3,), name='query')(x)
    x = nn.DenseGeneral((4, 8), name='spread')(x)
    return nn.DenseGeneral(8, axis=(-2, -1), name='gather')(x)


class AxesTest(parameterized.TestCase):

  INPUTS = normal(0, 2, 6, 4)

  def start(self, make):
    params = OddlyNamed().init(jax.random.key(0), self.INPUTS)['params']
    method = make()
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    return method, *sparse_jax.start(tx, method, params)

  def apply(self, method, params, opt_state):
    return sparse_jax.with_method(OddlyNamed().apply, method, opt_state)(
        {'params': params}, self.INPUTS)

  @parameterized.named_parameters(
      ('blocks', lambda **own: sparse_jax.rigl(
          .5, structure=laws.BLOCK, **own)),
      ('packed', lambda **own: sparse_jax.packed(sparse_jax.rigl(
          .5, structure=laws.BLOCK, **own))),
      ('erk', lambda **own: sparse_jax.static(
          .5, allocation=sparse_jax.erk, **own)))
  def test_a_wrong_guess_is_an_error_that_says_what_to_write(self, make):
    with self.assertRaisesRegex(ValueError, 'contracting'):
      self.apply(*self.start(make))
    axes = sparse_jax.contracting_axes(
        lambda params, x: OddlyNamed().apply({'params': params}, x),
        OddlyNamed().init(jax.random.key(0), self.INPUTS)['params'],
        self.INPUTS)
    method, params, opt_state = self.start(lambda: make(contracting=axes))
    self.assertEqual(axes, {'query/kernel': (1,), 'spread/kernel': (0,),
                            'gather/kernel': (0, 1)})
    through = self.apply(method, params, opt_state)
    weights = sparse_jax.dense_weights(method, params, opt_state)
    np.testing.assert_allclose(through, OddlyNamed().apply(
        {'params': weights}, self.INPUTS), atol=1e-5)

  def test_a_packed_table_is_assembled_where_it_is_looked_up(self):
    class Tied(nn.Module):

      @nn.compact
      def __call__(self, tokens):
        embed = nn.Embed(16, 8)
        return embed.attend(nn.Dense(8)(embed(tokens)))

    tokens = jnp.arange(12).reshape(3, 4)
    params = Tied().init(jax.random.key(0), tokens)['params']
    method = sparse_jax.packed(sparse_jax.static(
        .5, structure=laws.BLOCK, is_sparse={'embedding': True},
        contracting={'embedding': (1,)}))
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    params, opt_state = sparse_jax.start(tx, method, params)
    self.assertEqual(params['Embed_0']['embedding'].blocks.shape, (4, 4, 4))
    through = sparse_jax.with_method(Tied().apply, method, opt_state)(
        {'params': params}, tokens)
    weights = sparse_jax.dense_weights(method, params, opt_state)
    np.testing.assert_allclose(through, Tied().apply(
        {'params': weights}, tokens), atol=1e-5)


class KeysTest(parameterized.TestCase):

  PARAMS = {'a': normal(1, 8, 8), 'b': normal(2, 8, 8)}

  def first(self, key):
    method = sparse_jax.static(.75)
    tx = sparse_jax.sparsify(optax.sgd(.1), method, key=key)
    return sparse_jax.start(tx, method, self.PARAMS)[1]

  @parameterized.named_parameters(
      ('rbg', lambda: jax.random.key(7, impl='rbg')),
      ('unsafe_rbg', lambda: jax.random.key(7, impl='unsafe_rbg')),
      ('raw', lambda: jax.random.PRNGKey(7)), ('numpy', lambda: np.int64(7)),
      ('small', lambda: np.uint8(7)), ('int', lambda: 7),
      ('array', lambda: jnp.uint32(7)), ('saved', lambda: np.asarray(
          jax.random.PRNGKey(7))))
  def test_every_kind_of_key_draws_masks_of_its_own(self, make):
    masks, again, other = (sparse_jax.get_state(self.first(key)).forward_masks
                           for key in (make(), make(), None))
    self.assertEqual(int(masks['a'].sum()), 16)
    jax.tree.map(np.testing.assert_array_equal, masks, again)
    self.assertTrue(np.any(masks['a'] != other['a']))
    self.assertTrue(np.any(masks['a'] != masks['b']))

  def test_rbg_may_be_the_default(self):
    with jax.default_prng_impl('rbg'):
      state = sparse_jax.get_state(self.first(jax.random.key(3)))
      self.assertEqual(int(state.forward_masks['b'].sum()), 16)

  @parameterized.parameters('static', 'set_')
  def test_vmapped_seeds_have_masks_of_their_own(self, name):
    method = getattr(sparse_jax, name)(.75)

    def seed(key):
      tx = sparse_jax.sparsify(optax.adam(.1), method, key=key)
      params, state = sparse_jax.start(tx, method, self.PARAMS)
      updates, state = tx.update(params, state, params)
      del updates
      return sparse_jax.get_state(state).forward_masks['a']

    for keys in (jax.random.split(jax.random.key(0), 5), jnp.arange(5)):
      masks = jax.vmap(seed)(keys)
      np.testing.assert_array_equal(masks.sum((1, 2)), 16)
      self.assertLen({mask.tobytes() for mask in np.asarray(masks)}, 5)


class ShardMapTest(parameterized.TestCase):

  def test_masks_are_chosen_among_values_that_vary(self):
    mesh = jax.make_mesh((8,), ('data',),
                         axis_types=(jax.sharding.AxisType.Auto,))
    scores = normal(3, 8, 40)
    choose = jax.jit(jax.shard_map(
        lambda scores: sparse_jax.top_k_mask(scores[0], 7)[None], mesh=mesh,
        in_specs=PartitionSpec('data'), out_specs=PartitionSpec('data')))
    masks = choose(scores)
    for mask, own in zip(masks, scores):
      np.testing.assert_array_equal(mask, sparse_jax.top_k_mask(own, 7))


if __name__ == '__main__':
  absltest.main()
