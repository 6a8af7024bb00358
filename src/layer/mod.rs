//! Drop-in attention layers.
