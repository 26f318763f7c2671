//! Parameters of all ranks, each from the one that has stepped them, as the compute thread asks for them between two sums. Owns where they are put together: in
//! the memory that ranks share, or in one of the exchange's buffers.

use std::ops::Range;

use stoke_protocol::ids::Step;

use super::{Buffer, Exchange, ExchangeError, Input};
use crate::exchange::shares::Shares;

/// One that was begun: this rank's parameters go into [`Gathering::own`], then it is [`Gathering::complete`]d.
pub struct Gathering<'a> {
    exchange: &'a mut Exchange,
    step: Step,
    /// Of each rank.
    ranges: Vec<Range<usize>>,
    own: Range<usize>,
    place: Where,
}

enum Where {
    Buffer(Buffer),
    /// The memory of an operation, where all ranks are of one machine.
    Shared(u64),
    /// The same, with other machines.
    Spread(u64, Buffer),
}

impl Exchange {
    /// Begins to gather the parameters after `step` steps, which are dealt by `shares`. All ranks with lanes do, after the sum of the step before, or before the
    /// first of the generation. Not for the network thread.
    pub fn gather(&mut self, step: Step, shares: &Shares) -> Result<Gathering<'_>, ExchangeError> {
        assert!(!self.place.is_observer(), "X6: an observer has no share");
        assert!(shares.values() <= self.shape.values, "X18: shares of the vector's parameters");
        self.check_open(step)?;
        let ranges: Vec<Range<usize>> = (0..self.place.world).map(|rank| shares.range(rank)).collect();
        let own = ranges[self.place.position as usize].clone();
        let place = match &mut self.host {
            None => Where::Buffer(self.spare_sum()?),
            Some(host) => {
                let operation = host.next();
                if host.plan.is_spread() {
                    let Some(values) = host.take_sum(operation, || self.abort.is_set()) else {
                        return Err(self
                            .abort
                            .check()
                            .expect_err("X8: the wait ends with a buffer, or with a reason that stays"));
                    };
                    Where::Spread(operation, values)
                } else {
                    Where::Shared(operation)
                }
            }
        };
        Ok(Gathering { exchange: self, step, ranges, own, place })
    }

    /// The operation in whose memory they are put together; none: in `gathered`.
    fn put_together(
        &mut self,
        step: Step,
        ranges: Vec<Range<usize>>,
        place: Where,
    ) -> Result<Option<u64>, ExchangeError> {
        let operation = match place {
            Where::Buffer(values) => {
                self.gathered = Some(self.hear_of_others(step, ranges, values)?);
                return Ok(None);
            }
            Where::Spread(operation, values) => {
                let values = self.hear_of_others(step, ranges, values)?;
                self.host().put_sum(operation, values);
                operation
            }
            Where::Shared(operation) => operation,
        };
        // All of the host have added what they have stepped and heard (X14).
        self.host().added(operation);
        self.wait_for(|line| &line.added, operation)?;
        self.host().operations = operation;
        Ok(Some(operation))
    }

    fn hear_of_others(
        &mut self,
        step: Step,
        ranges: Vec<Range<usize>>,
        values: Buffer,
    ) -> Result<Buffer, ExchangeError> {
        let begun = Input::Gather { step, ranges, values };
        self.driver.send(begun).map_err(|_| ExchangeError::EndpointClosed)?;
        self.wait()
    }
}

impl<'a> Gathering<'a> {
    /// Where this rank's parameters belong.
    pub fn own(&mut self) -> &mut [f32] {
        match &mut self.place {
            Where::Buffer(values) | Where::Spread(_, values) => values.write(self.own.clone()),
            Where::Shared(operation) => {
                let memory = &self.exchange.host.as_ref().expect("X14: there is memory").memory;
                // SAFETY: shares are disjoint (X18), and this one is this rank's. Whoever read what was here, two operations ago, has given to the one after it
                // and all had before it ended (X14).
                unsafe { memory.sum_mut(*operation, self.own.clone()) }
            }
        }
    }

    /// The parameters of all ranks, each rank's in its range. Blocks until they are here.
    pub fn complete(self) -> Result<&'a [f32], ExchangeError> {
        let Self { exchange, step, ranges, place, .. } = self;
        match exchange.put_together(step, ranges, place) {
            Ok(Some(operation)) => Ok(exchange.host().memory.sum(operation)),
            Ok(None) => Ok(exchange.gathered.as_ref().expect("put there").read()),
            Err(error) => Err(exchange.failed.insert(error).clone()),
        }
    }
}
