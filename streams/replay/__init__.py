"""Replays of the log into Postgres: a rebuild of the live projections, a proof that they are right, and pasts.

Everything here folds into a schema of its own and leaves the live rows alone, but for a rebuild's swap.
"""

from esper.streams.replay.comparing import RowDifference as RowDifference
from esper.streams.replay.comparing import TableComparison as TableComparison
from esper.streams.replay.pasts import Past as Past
from esper.streams.replay.pasts import drop_past as drop_past
from esper.streams.replay.pasts import fold_past as fold_past
from esper.streams.replay.pasts import pasts as pasts
from esper.streams.replay.rebuilding import Comparison as Comparison
from esper.streams.replay.rebuilding import Rebuilt as Rebuilt
from esper.streams.replay.rebuilding import rebuild as rebuild
from esper.streams.replay.refolding import Tell as Tell
from esper.streams.replay.refolding import Told as Told
from esper.streams.replay.until import Until as Until
from esper.streams.replay.verifying import verify as verify
