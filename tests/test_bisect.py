from fasterai.deploy.bisect import bisect
from fasterai.deploy.why import NOT_TRIED


def calls_of(bad, n=16, kinds=None, seconds=100):
    "Bisect n sets of which some fail; return the result, and how often was tried."
    tried = []

    def fails(sets):
        tried.append(sets)
        return next((f'{s} fails' for s in sets if s in bad), '')
    found = bisect(list(range(n)), fails, kinds or list(range(n)), seconds)
    return (*found, len(tried))


def test_what_all_can_go_is_tried_once(): assert calls_of(set()) == (list(range(16)), {}, 1)


def test_one_that_fails_is_found_by_halves():
    good, bad, tried = calls_of({5})
    assert sorted(good) == [n for n in range(16) if n != 5] and bad == {5: '5 fails'} and tried <= 9


def test_those_that_are_alike_are_refused_at_once():
    good, bad, tried = calls_of(set(range(0, 16, 2)), kinds=[n % 2 for n in range(16)])
    assert sorted(good) == list(range(1, 16, 2)) and set(bad) == set(range(0, 16, 2)) and tried <= 10


def test_those_that_are_alike_may_go_where_one_fails():
    good, bad, _ = calls_of({0}, kinds=[0] * 16)
    assert sorted(good) == list(range(1, 16)) and set(bad) == {0}


def test_it_ends(): assert calls_of({3}, seconds=-1)[:2] == ([], dict.fromkeys(range(16), NOT_TRIED))
