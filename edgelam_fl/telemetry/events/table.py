"""The kinds of events: the name in the file, and the dataclass that a line is read into. One line per event."""

from __future__ import annotations

from edgelam_fl.telemetry.events import nodes, plans, progress, rounds, run
from edgelam_fl.telemetry.events.base import Event, UnknownEvent

EVENTS: dict[str, type[Event]] = {
    "run_waits": run.RunWaits,
    "run_started": run.RunStarted,
    "node_joined": run.NodeJoined,
    "node_refused": run.NodeRefused,
    "link_measured": run.LinkMeasured,
    "privacy_promised": run.PrivacyPromised,
    "pieces": plans.PiecesChosen,
    "placement": plans.PlacementMade,
    "plan": plans.PlanMade,
    "progress": progress.RoundProgress,
    "text_readable": plans.TextReadable,
    "node_lost": rounds.NodeLost,
    "node_silent": rounds.NodeSilent,
    "message_resent": rounds.MessageResent,
    "attempt_aborted": rounds.AttemptAborted,
    "node_set_aside": rounds.NodeSetAside,
    "late_update": rounds.LateUpdate,
    "site_lost": rounds.SiteLost,
    "contribution_left_out": rounds.ContributionLeftOut,
    "aggregate_refused": rounds.AggregateRefused,
    "privacy_spent": rounds.PrivacySpent,
    "channel_noise": rounds.ChannelNoise,
    "budget_spent": rounds.BudgetSpent,
    "stopped_early": rounds.StoppedEarly,
    "best_taken": rounds.BestTaken,
    "shares": rounds.RoundShares,
    "timeline": rounds.RoundTimeline,
    "round_done": rounds.RoundDone,
    "disk_full": run.DiskFull,
    "events_dropped": run.EventsDropped,
    "tracker_failed": run.TrackerFailed,
    "route_ready": run.RouteReady,
    "run_interrupted": run.RunInterrupted,
    "run_resumed": run.RunResumed,
    "run_done": run.RunDone,
    "run_failed": run.RunFailure,
    "ready": nodes.NodeReady,
    "slice_coming": nodes.SliceComing,
    "slice_received": nodes.SliceReceived,
    "job_started": nodes.JobStarted,
    "tensors_asked": nodes.TensorsAsked,
    "job_resumed": nodes.JobResumed,
    "snapshot_lost": nodes.SnapshotLost,
    "snapshot_ignored": nodes.SnapshotIgnored,
    "text_readable_here": nodes.TextReadableHere,
    "data_read": nodes.DataRead,
    "data_changed": nodes.DataChanged,
    "window": nodes.WindowGranted,
    "evaluated": nodes.Evaluated,
    "step": nodes.StepDone,
    "step_closed": nodes.StepClosed,
    "link_lost": nodes.LinkLost,
    "link_resumed": nodes.LinkResumed,
    "link_suspended": nodes.LinkSuspended,
    "job_done": nodes.JobDone,
}


def kind_of(event: Event) -> str:
    """Returns the name of an event's kind in the file."""
    if isinstance(event, UnknownEvent):
        return event.kind
    return next(kind for kind, cls in EVENTS.items() if cls is type(event))
