//! The feature maps in the table.

use dijiang::kernel::{DctMapConfig, DctParams, Envelope, FavorConfig, FavorRows, Mixing, Radial};

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Paper,
    Centred,
    Mixed,
    Oprf,
    FavorIid,
    Favor,
    FavorCentred,
    Calibrated,
}

/// What maps are told about a head's scaled queries x and keys y.
pub(crate) struct Moments {
    /// Mean of x.
    pub(crate) query: Vec<f64>,
    /// Mean of y.
    pub(crate) key: Vec<f64>,
    /// Mean of |x + y|² over all pairs of centred ones.
    pub(crate) phi: f64,
}

impl Kind {
    /// In the order of the table.
    pub(crate) const ALL: [Self; 8] = [
        Self::Paper,
        Self::Centred,
        Self::Mixed,
        Self::Oprf,
        Self::FavorIid,
        Self::Favor,
        Self::FavorCentred,
        Self::Calibrated,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Paper => "paper's DCT map",
            Self::Centred => "+ centres",
            Self::Mixed => "centres + mixed + chi + Gaussian envelope",
            Self::Oprf => "the same + OPRF weights",
            Self::FavorIid => "FAVOR+, iid rows",
            Self::Favor => "FAVOR+, orthogonal rows",
            Self::FavorCentred => "FAVOR+, orthogonal rows + centres",
            Self::Calibrated => "DCT map + centres, calibrated",
        }
    }

    /// The numbers of such a map with `blocks`·`dim` features; for [`Kind::Calibrated`] those it
    /// starts from.
    pub(crate) fn params(
        self,
        dim: usize,
        blocks: usize,
        seed: u64,
        moments: &Moments,
    ) -> dijiang::Result<DctParams> {
        let dct = DctMapConfig::new().with_blocks(blocks).with_seed(seed);
        let favor = FavorConfig::new(dim, dim.saturating_mul(blocks)).with_seed(seed);
        let mut params = match self {
            Self::Paper | Self::Centred | Self::Calibrated => dct.params(dim)?,
            Self::Mixed | Self::Oprf => dct
                .with_mixing(Mixing::Mixed)
                .with_radial(Radial::Chi)
                .with_envelope(Envelope::Gaussian)
                .params(dim)?,
            Self::FavorIid => favor.with_rows(FavorRows::Iid).params()?,
            Self::Favor | Self::FavorCentred => favor.with_rows(FavorRows::Orthogonal).params()?,
        };
        if !matches!(self, Self::Paper | Self::FavorIid | Self::Favor) {
            params.query.center.clone_from(&moments.query);
            params.key.center.clone_from(&moments.key);
        }
        if self == Self::Oprf { params.with_oprf(moments.phi) } else { Ok(params) }
    }
}
