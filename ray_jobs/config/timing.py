"""The intervals of a driver and its workers as one value, so that tests take milliseconds for production's seconds."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Intervals of the driver, the pool and the workers, in seconds unless stated otherwise.

    Attributes:
        poll: Longest wait for workers before the pool checks signals and deadlines.
        back_off: Delay before an item is retried, doubled by each attempt.
        max_pause: Longest delay, also if a busy server asks for more.
        max_waited: Total delay of an item after which further refusals by a busy server count as attempts.
        answer_timeout: Longest time for fetching an answer that Ray has reported as ready.
        first_commit: Time that a worker works before its first commit, when the duration of a commit is not known.
        commit_ratio: Time that a worker works between two commits, relative to the duration of the last one. So commits
            take at most 1/commit_ratio of the time.
        node_interval: Time between two queries of the cluster's nodes.
        display_interval: Time between two updates of the progress that people and Prometheus see.
        log_interval: Time between two progress lines of a log.
        track_interval: Time between two points that are sent to an experiment tracker.
        slow_shard: Age at which the progress line names a shard.
        report_interval: Time between two reports of a worker about its shard.
        reader_exit: Longest wait for a reading thread before its process ends; a running thread would abort it.
        heartbeat_interval: Time between two heartbeats of a driver.
        stale_after: Silence after which a driver counts as ended.
        watch_interval: Time between two readings of another driver's heartbeat.

    Example:
        >>> Timing(back_off=0.001).back_off
        0.001
    """

    poll: float = 0.5
    back_off: float = 1.0
    max_pause: float = 600.0
    max_waited: float = 3600.0
    answer_timeout: float = 60.0
    first_commit: float = 30.0
    commit_ratio: float = 200.0
    node_interval: float = 5.0
    display_interval: float = 0.5
    log_interval: float = 15.0
    track_interval: float = 15.0
    slow_shard: float = 60.0
    report_interval: float = 3.0
    reader_exit: float = 10.0
    heartbeat_interval: float = 5.0
    stale_after: float = 30.0
    watch_interval: float = 1.0


PRODUCTION = Timing()
