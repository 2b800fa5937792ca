from guard.evaluation.attack import SPARING, Task, tasks_of
from tests.test_evaluation_run import attack


def test_tasks_are_cheap_ones_first_and_named_by_budget() -> None:
    dear, cheap = attack(name="dear-l2", passes=20, budgets=None), attack(name="cheap-l2", passes=10)
    denial = attack(name="denial-l2", passes=10, budgets=(0.5,))
    tasks = tasks_of([dear, cheap], [denial])
    names = ["cheap-l2-2.0", "cheap-l2-2.5", "cheap-l2-3.0", "denial-l2-0.5", "dear-l2"]
    assert [task.name for task in tasks] == names
    assert [task.denial for task in tasks] == [False, False, False, True, False]


def test_dear_attacks_on_the_detector_spare_images() -> None:
    dear = attack(aware="jacobian", passes=SPARING)
    assert Task(dear, 2.0).skips
    assert Task(attack(aware="jacobian", knowledge="decisions"), 2.0).skips
    assert Task(attack(aware="jacobian", knowledge="another network"), 2.0).skips
    assert not Task(attack(knowledge="another network"), 2.0).skips
    assert not Task(dear, None).skips
    assert not Task(dear, 2.0, denial=True).skips
    assert not Task(attack(aware="jacobian", passes=SPARING - 1), 2.0).skips
    assert not Task(attack(passes=SPARING), 2.0).skips
