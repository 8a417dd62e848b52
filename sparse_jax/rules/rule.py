"""A method as one value: a rule on groups, and what stands beside it."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from sparse_jax import trees
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import now as now_lib
from sparse_jax.rules.state import Work

Leaf = leaves_lib.Leaf
Now = now_lib.Now
# bool of the groups' shape for A = B, or a pair of them for A and B.
Sets = jax.Array | tuple[jax.Array, jax.Array]


class Rule(NamedTuple):
  """What a sparse-training method is made of; `make_method` makes the method.

  Example:
    >>> import optax, sparse_jax
    >>> from sparse_jax import rules
    >>> def choose(leaf, now):
    ...   return leaf.top(now.magnitudes)
    >>> method = rules.make_method(rules.Rule(
    ...     'every_tenth', rules.Sites(.75), choose,
    ...     refreshes=lambda step: step % 10 == 0))
    >>> params = {'kernel': jax.numpy.arange(8.).reshape(2, 4)}
    >>> method.read(params, method.init(params))['kernel']
    Array([[0., 0., 0., 0.],
           [0., 0., 6., 7.]], dtype=float32)
  """

  name: str  # Of the method; its arguments need not be in it.
  sites: leaves_lib.Sites  # Which leaves, how sparse, in what groups.
  # (leaf, now) -> Sets: the sets after a refresh, and the first ones too.
  # With `together`: ({path: leaf}, {path: now}, Seen) -> ({path: Sets}, extra).
  choose: Callable[..., Any]
  # (leaf, now) -> Sets for the first masks; None: `choose`.
  first: Callable[[Leaf, Now], Sets] | None = None
  # Updates done -> whether masks refresh then; None: never.
  refreshes: Callable[[Any], Any] | None = None
  # The weights whose gradient the rule or the optimizer needs: 'A', 'B' or
  # 'all'; and whether 'all' only where masks refresh.
  gradient: str = 'A'
  only_at_refresh: bool = False
  # Whether stored weights are exactly 0 outside A, and where they enter it;
  # else they keep their values, hidden.
  zeros: bool = False
  # (leaf, weight, old A, key, extra) -> first values of entries that enter A,
  # where these are not 0; weight and A are of the leaf's shape.
  grown: Callable[..., jax.Array] | None = None
  # Whether `extra` is {path: the leaf's weights at the start}.
  keeps_first: bool = False
  # Whether a refresh replaces the optimizer's step.
  skip_step: bool = False
  # Whether the leaves choose together.
  together: bool = False
  # Whether weights are judged as they were before the update.
  before_update: bool = False
  # {path: leaf} -> the method's own arrays at the start.
  extra: Callable[[dict[trees.Path, Leaf]], Any] | None = None
  # (Seen, extra) -> extra, at every update, before masks are chosen.
  remember: Callable[[Any, Any], Any] | None = None
  # (params, forward masks, backward masks, plan) -> float32[], for the loss.
  penalty: Callable[..., jax.Array] | None = None
  # SparseState -> bool[]: whether the coming update makes all slots anew.
  resets: Callable[[Any], jax.Array] | None = None
  # The share of the final sparsity that masks have after a number of updates,
  # as numpy; None: always 1.
  progress: Callable[[np.ndarray], np.ndarray] | None = None
  # Why counts of groups change during a run, so that it cannot be packed.
  unpackable: str = ''


def random_first(leaf: Leaf, now: Now) -> jax.Array:
  """The first masks of methods that start at random, as `Rule.first`.

  Args:
    leaf: the leaf.
    now: what a rule may look at; of it the step's key counts.

  Returns:
    bool of the groups' shape, `leaf.count` True in each competition.

  Example:
    >>> import sparse_jax
    >>> rule = Rule('random', leaves_lib.Sites(.75),
    ...             lambda leaf, now: now.active, first=random_first)
    >>> params = {'kernel': jax.numpy.ones((4, 4))}
    >>> method = sparse_jax.rules.make_method(rule)
    >>> float(method.read(params, method.init(params))['kernel'].sum())
    4.0
  """
  return leaf.top(now.random)


def full_first(leaf: Leaf, now: Now) -> jax.Array:
  """The first masks of methods that start dense, as `Rule.first`.

  Args:
    leaf: the leaf.
    now: not looked at.

  Returns:
    bool of the groups' shape, all True.

  Example:
    >>> leaf = leaves_lib.Sites(.75).leaves({'w': jax.numpy.ones((2, 2))})['w']
    >>> full_first(leaf, None).tolist()
    [[True, True], [True, True]]
  """
  del now
  return leaf.full()


def work_of(rule: Rule
            ) -> Callable[[trees.PyTree, int], dict[trees.Path, Work]]:
  """A method's `work`, from the groups that it keeps and trains.

  Where the gradient of all weights is needed at refreshes alone, one of
  `update_every` + 1 steps is dense, as RigL's paper counts.
  """
  def work(params, steps):
    shares = {path: _shares(rule, leaf)
              for path, leaf in rule.sites.leaves(params).items()}
    if rule.progress is None:
      progress = 1.
    else:
      progress = float(np.mean(rule.progress(np.arange(max(steps, 1)))))
    return {path: Work(*(1 - (1 - share) * progress for share in own))
            for path, own in shares.items()}

  return work


def _shares(rule, leaf) -> tuple[float, float, float]:
  forward = leaf.layout.share(leaf.count)
  backward = {'A': forward, 'all': 1.,
              'B': leaf.layout.share(leaf.backward_count)}[rule.gradient]
  if rule.only_at_refresh:
    often = refresh_period(rule)
    backward = (often * forward + 1) / (often + 1)
  return forward, forward, backward


def refresh_period(rule: Rule) -> float:
  """Updates from one refresh to the next."""
  return getattr(rule.refreshes, 'every', 1)
