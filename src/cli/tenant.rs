//! `--tenant NAME[:WEIGHT]=KEY` in words. What a name, weight or key may be is the coordinator's to check.

/// A tenant of `baton up`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Its share against others'.
    pub weight: u32,
    /// Its clients' key.
    pub api_key: String,
}

/// Reads the flag's value.
pub fn parse(text: &str) -> Result<Tenant, String> {
    // Not the text itself: it holds a key.
    let wrong = || "a tenant is NAME=KEY or NAME:WEIGHT=KEY, where WEIGHT is a whole number".to_owned();
    let (who, api_key) = text.split_once('=').ok_or_else(wrong)?;
    let (name, weight) = match who.rsplit_once(':') {
        None => (who, 1),
        Some((name, weight)) => (name, weight.parse().map_err(|_| wrong())?),
    };
    if name.is_empty() || api_key.is_empty() {
        return Err(wrong());
    }
    Ok(Tenant {
        name: name.to_owned(),
        weight,
        api_key: api_key.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_weights_and_any_key() {
        let tenant = |name: &str, weight, api_key: &str| {
            Ok(Tenant {
                name: name.into(),
                weight,
                api_key: api_key.into(),
            })
        };
        assert_eq!(parse("acme=sk-1"), tenant("acme", 1, "sk-1"));
        assert_eq!(parse("acme:3=s:k=1"), tenant("acme", 3, "s:k=1"));
        for wrong in ["acme", "acme=", "=key", "acme:x=key", "acme:-1=key", ":2=key"] {
            assert!(parse(wrong).is_err_and(|message| !message.contains("key")), "{wrong}");
        }
    }
}
