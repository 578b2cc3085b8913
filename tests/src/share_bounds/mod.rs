//! Share groups at their limits, in the engine alone: what is bounded, and what each record costs.

mod bench;
mod limits;
mod scenarios;
mod throughput;

pub use limits::{
    a_full_table_stops_new_records_only, a_group_goes_on_above_what_was_deleted,
    a_spent_budget_slows_new_records_down, an_idle_group_forgets,
    frames_stay_small_when_many_leases_end_at_once,
};
pub use scenarios::{
    Idle, Members, Retry, StuckKey, WAVERING_BYTES, Window, a_partition_in_retry, acks_above_a_stuck_record,
    assert_spread, idle_groups, leases_that_expire_together, members_come_and_go, one_stuck_key,
};
pub use throughput::{Cost, Load, throughput};
