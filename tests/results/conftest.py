"""Fixtures that several test files of this room share."""

import pytest

from sft.results.answers import list_turns
from sft.results.page import write_report
from sft.results.summary import run_summary
from tests.results.chatters import CONVERSATIONS, make_it_stop, random_chatter
from tests.results.runs import Page, write_hostile_run, write_run


@pytest.fixture(scope="session")
def ordinary(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("ordinary"))
    return folder, Page(write_report(folder)), run_summary(folder)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    folder = write_hostile_run(tmp_path_factory.mktemp("hostile"))
    return folder, Page(write_report(folder)), run_summary(folder)


@pytest.fixture(scope="module")
def llama():
    chatter = random_chatter("smollm2")
    make_it_stop(chatter, list_turns(CONVERSATIONS, chatter.encoder))
    return chatter
