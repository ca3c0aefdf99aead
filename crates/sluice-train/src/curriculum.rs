//! Which tokens count in a step, and how much (row B4): the sampler itself is `sluice_data::curriculum`.
