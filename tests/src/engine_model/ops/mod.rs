//! Random commands. Each one is given to the engine and told to the model, which says what the answer must be.

mod consumers;
mod groups;
mod members;
mod produce;
mod topics;

use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, PartitionKey};

use super::rng::Rng;
use super::world::{Fate, World};

/// What a run does how often: every run draws its own, and leaves some things out.
#[derive(Clone, Debug)]
pub(crate) struct Weights([u64; KINDS]);

const KINDS: usize = 21;

impl Weights {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let mut weights = [30, 6, 25, 6, 2, 2, 2, 3, 3, 3, 8, 6, 2, 1, 2, 3, 3, 3, 2, 3, 12];
        for weight in &mut weights {
            match rng.below(4) {
                0 => *weight /= 3,
                1 => *weight *= 3,
                _ => {}
            }
        }
        Self(weights)
    }

    fn pick(&self, rng: &mut Rng) -> usize {
        let mut left = rng.below(self.0.iter().sum::<u64>().max(1));
        for (kind, weight) in self.0.iter().enumerate() {
            if left < *weight {
                return kind;
            }
            left -= weight;
        }
        0
    }
}

impl World {
    /// One random command.
    pub(crate) fn operate(&mut self, weights: &Weights) {
        match weights.pick(&mut self.rng) {
            0 => self.settle_some(),
            1 => self.complete_one(),
            2 => self.produce(),
            3 => self.subscribe(),
            4 => self.unsubscribe(),
            5 => self.create_topic(),
            6 => self.alter_topic(),
            7 => self.create_share_group(),
            8 => self.alter_share_group(),
            9 => self.pause_group(),
            10 => self.give_credit(),
            11 => self.members_seen(60),
            12 => self.seek_group(),
            13 => self.delete_topic(),
            14 => self.delete_group(),
            15 => self.commit_offsets(),
            16 => self.init_producer(),
            17 => self.kick_group(),
            18 => self.delete_records(),
            19 => self.end_held(),
            _ => self.heartbeat(),
        }
        self.check_fresh();
    }

    /// A turn of random commands; answers whether the process died in it.
    pub(crate) fn random_turn(&mut self, weights: &Weights) {
        self.begin_turn();
        let tick_at = self.rng.below(3);
        if tick_at == 0 {
            self.tick();
        }
        self.answer_scans(80);
        self.answer_letters(60);
        for _ in 0..self.rng.between(0, 4) {
            self.operate(weights);
        }
        if tick_at == 1 {
            self.tick();
        }
    }

    /// Ends a random turn, with a crash now and then.
    pub(crate) fn end_random_turn(&mut self, crashes: u64) {
        if !self.rng.chance(crashes) {
            self.end_turn(Fate::Released);
            return;
        }
        let power = self.rng.chance(50);
        if self.rng.chance(10) {
            self.stop();
            self.crash(power, true);
            return;
        }
        let fates = [Fate::Released, Fate::Unwritten, Fate::Unreleased];
        let fate = fates[self.rng.below(3) as usize];
        self.note(|| format!("the process dies: {fate:?}"));
        self.end_turn(fate);
        self.crash(power, false);
    }

    pub(crate) fn any_name(&mut self, names: &[&str]) -> String {
        (*self.rng.pick(names).expect("there are names")).to_owned()
    }

    pub(crate) fn any_topic(&mut self) -> Option<String> {
        let names: Vec<String> = self.model.topics.values().map(|topic| topic.name.clone()).collect();
        self.rng.pick(&names).cloned()
    }

    pub(crate) fn any_partition(&mut self) -> Option<PartitionKey> {
        let keys: Vec<PartitionKey> = self.model.logs.keys().copied().collect();
        self.rng.pick(&keys).copied()
    }

    pub(crate) fn any_share_group(&mut self) -> Option<String> {
        let names: Vec<String> = self.model.shares.keys().cloned().collect();
        self.rng.pick(&names).cloned()
    }

    /// Gives a command that must be refused with one of these errors.
    pub(crate) fn refused(&mut self, command: Command, right: impl Fn(&EngineError) -> bool) {
        let before = self.staged_events();
        let reply = self.ask(command, Level::Written);
        match &reply {
            Reply::Error(error) if right(error) => {}
            _ => panic!("must be refused, otherwise than {reply:?}"),
        }
        assert_eq!(self.staged_events(), before, "refused with {reply:?}, and yet something was done");
    }
}
