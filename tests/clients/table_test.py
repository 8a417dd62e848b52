"""The page of loops and methods says what the tests run."""

from absl.testing import absltest

from tests.clients import laws
from tests.clients import table


class TableTest(absltest.TestCase):

  def test_the_page_is_up_to_date(self):
    self.assertEqual(table.PAGE.read_text(), table.page(),
                     'run: python -m tests.clients.table')

  def test_every_loop_says_what_to_write(self):
    titles = [loop.title for loop in table.loops()]
    self.assertLen(set(titles), len(titles))
    for loop in table.loops():
      self.assertIn('```', loop.recipe, loop)
      self.assertLessEqual(set(loop.refused) | set(loop.still),
                           set(laws.METHODS))


if __name__ == '__main__':
  absltest.main()
