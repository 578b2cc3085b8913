//! Share groups at their limits, in short; `cargo run --release -p felucca-tests --bin share-bounds` runs the long forms
//! and shows their figures. See `felucca_tests::share_bounds`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use felucca_tests::share_bounds::{self as bounds, Window};

/// Resident memory is the process's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory does not grow after a beginning.
fn assert_flat(windows: &[Window]) {
    let (first, last) = (windows[2], windows[windows.len() - 1]);
    assert!(last.resident as f64 <= first.resident as f64 * 1.05 + bounds::WAVERING_BYTES, "{windows:#?}");
    assert!(last.charged as f64 <= first.charged as f64 * 1.05 + 65_536.0, "{windows:#?}");
}

#[test]
fn acks_above_a_stuck_record_take_no_memory() {
    let _alone = alone();
    assert_flat(&bounds::acks_above_a_stuck_record(200_000));
}

#[test]
fn a_partition_all_of_whose_records_wait_for_a_retry_takes_in_new_ones_and_recovers() {
    let _alone = alone();
    bounds::a_partition_in_retry(20_000).assert_bounded();
}

#[test]
fn records_behind_a_stuck_key_take_no_memory_and_keep_their_order() {
    let _alone = alone();
    let stuck = bounds::one_stuck_key(20_000);
    assert_flat(&stuck.windows);
    stuck.assert_bounded();
}

#[test]
fn leases_that_expire_together_come_back_spread_and_within_credit() {
    let _alone = alone();
    bounds::assert_spread(&bounds::leases_that_expire_together(10_000));
}

#[test]
fn a_member_that_comes_back_or_is_lost_costs_its_own_leases_only() {
    let _alone = alone();
    let few = bounds::members_come_and_go(100);
    bounds::members_come_and_go(2_000).assert_like(&few);
}

#[test]
fn idle_groups_cost_next_to_nothing() {
    let _alone = alone();
    bounds::idle_groups(1_000).assert_bounded();
}

#[test]
fn a_full_table_stops_new_records_only() {
    let _alone = alone();
    bounds::a_full_table_stops_new_records_only();
}

#[test]
fn a_spent_budget_slows_new_records_down() {
    let _alone = alone();
    bounds::a_spent_budget_slows_new_records_down();
}

#[test]
fn frames_stay_small_when_many_leases_end_at_once() {
    let _alone = alone();
    bounds::frames_stay_small_when_many_leases_end_at_once();
}

#[test]
fn an_idle_group_forgets() {
    let _alone = alone();
    bounds::an_idle_group_forgets();
}

#[test]
fn a_group_goes_on_above_what_was_deleted() {
    let _alone = alone();
    bounds::a_group_goes_on_above_what_was_deleted();
}
