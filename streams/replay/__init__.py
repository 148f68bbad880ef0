"""Replays of the log into Postgres: rebuilds of the live projections, verification, and snapshots.

Every replay projects into a separate schema. Invariant: the live rows change only in the swap of a rebuild.
"""

from esper.streams.replay.cutoff import Cutoff as Cutoff
from esper.streams.replay.projection_rebuild import ComparisonOptions as ComparisonOptions
from esper.streams.replay.projection_rebuild import RebuildResult as RebuildResult
from esper.streams.replay.projection_rebuild import rebuild as rebuild
from esper.streams.replay.replay_projection import ProgressCallback as ProgressCallback
from esper.streams.replay.replay_projection import ReplayProgress as ReplayProgress
from esper.streams.replay.row_comparison import RowDifference as RowDifference
from esper.streams.replay.row_comparison import TableComparison as TableComparison
from esper.streams.replay.snapshots import Snapshot as Snapshot
from esper.streams.replay.snapshots import create_snapshot as create_snapshot
from esper.streams.replay.snapshots import drop_snapshot as drop_snapshot
from esper.streams.replay.snapshots import list_snapshots as list_snapshots
from esper.streams.replay.verification import verify as verify
