//! Tensors as the protocol writes them: names of data types, JSON values, bytes. Pure.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use stoke_protocol::message::serve::{Datatype, Tensor};

use crate::gateway::error::Problem;

/// Values of one tensor: more do not fit the frame of a question, whatever their type.
const VALUES_MAX: usize = 1 << 20;
const DIMENSIONS_MAX: usize = 8;
const NAME_BYTES_MAX: usize = 256;

const DATATYPES: [(&str, Datatype); 7] = [
    ("BOOL", Datatype::Bool),
    ("UINT8", Datatype::U8),
    ("INT32", Datatype::I32),
    ("INT64", Datatype::I64),
    ("FP32", Datatype::F32),
    ("FP64", Datatype::F64),
    ("BYTES", Datatype::Bytes),
];

pub(super) fn name_of(datatype: Datatype) -> &'static str {
    let found = DATATYPES.iter().find(|(_, known)| *known == datatype);
    found.expect("each data type has a name").0
}

pub(super) fn datatype(tensor: &str, name: &str) -> Result<Datatype, Problem> {
    let found = DATATYPES.iter().find(|(known, _)| *known == name);
    found.map(|(_, datatype)| *datatype).ok_or_else(|| {
        let known = DATATYPES.map(|(name, _)| name).join(", ");
        wrong(tensor, &format!("data type {:?} is not one of {known}", name.chars().take(32).collect::<String>()))
    })
}

fn wrong(tensor: &str, what: &str) -> Problem {
    let shown: String = tensor.chars().take(NAME_BYTES_MAX).collect();
    Problem::field(shown.clone(), format!("tensor {shown:?}: {what}"))
}

/// A tensor whose bytes are what its shape says.
pub(super) fn checked(name: String, datatype: Datatype, shape: Vec<u64>, values: Vec<u8>) -> Result<Tensor, Problem> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(wrong(&name, &format!("a name has 1 to {NAME_BYTES_MAX} bytes")));
    }
    if shape.len() > DIMENSIONS_MAX {
        return Err(wrong(&name, &format!("a shape has at most {DIMENSIONS_MAX} dimensions")));
    }
    let wanted = shape.iter().try_fold(1u64, |product, length| product.checked_mul(*length));
    let wanted = wanted.filter(|wanted| *wanted <= VALUES_MAX as u64);
    let wanted = wanted.ok_or_else(|| wrong(&name, &format!("a tensor has at most {VALUES_MAX} values")))?;
    match count(datatype, &values) {
        Some(found) if found as u64 == wanted => {
            Ok(Tensor { name, datatype, shape: shape.into(), values: values.into() })
        }
        Some(found) => Err(wrong(&name, &format!("shape {shape:?} has {wanted} values, and {found} were sent"))),
        None => Err(wrong(&name, &format!("its bytes are not a whole number of {} values", name_of(datatype)))),
    }
}

/// How many values there are; none where the bytes do not come out even.
fn count(datatype: Datatype, values: &[u8]) -> Option<usize> {
    let bytes = match datatype {
        Datatype::Bool | Datatype::U8 => 1,
        Datatype::I32 | Datatype::F32 => 4,
        Datatype::I64 | Datatype::F64 => 8,
        Datatype::Bytes => return elements(values).map(|elements| elements.len()),
    };
    values.len().is_multiple_of(bytes).then_some(values.len() / bytes)
}

/// The elements of a tensor of bytes.
fn elements(mut values: &[u8]) -> Option<Vec<&[u8]>> {
    let mut elements = Vec::new();
    while !values.is_empty() {
        let (length, rest) = values.split_first_chunk::<4>()?;
        let (element, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        elements.push(element);
        values = rest;
    }
    Some(elements)
}

/// The bytes of a tensor of bytes.
pub(super) fn joined<'a>(elements: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut values = Vec::new();
    for element in elements {
        let length = u32::try_from(element.len()).expect("the body of a request is below 4 GiB");
        values.extend_from_slice(&length.to_le_bytes());
        values.extend_from_slice(element);
    }
    values
}

/// The texts of a tensor of bytes.
pub(super) fn texts(tensor: &Tensor) -> Result<Vec<String>, Problem> {
    if tensor.datatype != Datatype::Bytes {
        return Err(wrong(&tensor.name, "texts have the data type BYTES"));
    }
    let elements = elements(&tensor.values).unwrap_or_default();
    let text = |element: &[u8]| String::from_utf8(element.to_vec()).map_err(|_| wrong(&tensor.name, "it is not UTF-8"));
    elements.into_iter().map(text).collect()
}

/// Values as they stand in JSON, whatever arrays they are nested in.
#[derive(Debug, PartialEq)]
pub(super) enum Flat {
    Bools(Vec<bool>),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Texts(Vec<String>),
}

impl Flat {
    /// The bytes of a tensor of `datatype`.
    pub(super) fn into_values(self, tensor: &str, datatype: Datatype) -> Result<Vec<u8>, Problem> {
        let misfit = || wrong(tensor, &format!("a value that was sent is not of data type {}", name_of(datatype)));
        match (datatype, self) {
            (_, Self::Integers(values)) if values.is_empty() => Ok(Vec::new()),
            (Datatype::Bool, Self::Bools(values)) => Ok(values.into_iter().map(u8::from).collect()),
            (Datatype::U8, Self::Integers(values)) => {
                values.into_iter().map(|value| u8::try_from(value).map_err(|_| misfit())).collect()
            }
            (Datatype::I32, Self::Integers(values)) => {
                let whole: Result<Vec<[u8; 4]>, _> = values
                    .into_iter()
                    .map(|value| Ok(i32::try_from(value).map_err(|_| misfit())?.to_le_bytes()))
                    .collect();
                Ok(whole?.concat())
            }
            (Datatype::I64, Self::Integers(values)) => Ok(values.into_iter().flat_map(i64::to_le_bytes).collect()),
            (Datatype::F32 | Datatype::F64, Self::Integers(values)) => {
                Self::Floats(values.into_iter().map(|value| value as f64).collect()).into_values(tensor, datatype)
            }
            (Datatype::F32, Self::Floats(values)) => {
                let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
                match values.iter().all(|value| value.is_finite()) {
                    true => Ok(values.into_iter().flat_map(f32::to_le_bytes).collect()),
                    false => Err(misfit()),
                }
            }
            (Datatype::F64, Self::Floats(values)) => Ok(values.into_iter().flat_map(f64::to_le_bytes).collect()),
            (Datatype::Bytes, Self::Texts(texts)) => Ok(joined(texts.iter().map(String::as_bytes))),
            (_, Self::Bools(_) | Self::Integers(_) | Self::Floats(_) | Self::Texts(_)) => Err(misfit()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Bools(values) => values.len(),
            Self::Integers(values) => values.len(),
            Self::Floats(values) => values.len(),
            Self::Texts(values) => values.len(),
        }
    }
}

impl<'de> Deserialize<'de> for Flat {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut flat = Self::Integers(Vec::new());
        Filling(&mut flat).deserialize(deserializer)?;
        Ok(flat)
    }
}

/// Adds what it reads.
struct Filling<'a>(&'a mut Flat);

impl<'de> DeserializeSeed<'de> for Filling<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Filling<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("values of one kind, in arrays")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        if self.0.len() == 0 {
            *self.0 = Flat::Bools(Vec::new());
        }
        match self.0 {
            Flat::Bools(values) => values.push(value),
            _ => return Err(E::custom("values of more than one kind")),
        }
        Ok(())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        match self.0 {
            Flat::Integers(values) => values.push(value),
            Flat::Floats(values) => values.push(value as f64),
            Flat::Bools(_) | Flat::Texts(_) => return Err(E::custom("values of more than one kind")),
        }
        Ok(())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        match i64::try_from(value) {
            Ok(value) => self.visit_i64(value),
            Err(_) => self.visit_f64(value as f64),
        }
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        if let Flat::Integers(values) = self.0 {
            *self.0 = Flat::Floats(values.iter().map(|value| *value as f64).collect());
        }
        match self.0 {
            Flat::Floats(values) => values.push(value),
            _ => return Err(E::custom("values of more than one kind")),
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        if self.0.len() == 0 {
            *self.0 = Flat::Texts(Vec::new());
        }
        match self.0 {
            Flat::Texts(values) => values.push(text.to_owned()),
            _ => return Err(E::custom("values of more than one kind")),
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Filling(&mut *self.0))?.is_some() {
            if self.0.len() > VALUES_MAX {
                return Err(A::Error::custom(format!("more than {VALUES_MAX} values")));
            }
        }
        Ok(())
    }
}

/// A tensor's values for JSON. What is not a number there (JSON has no infinity) becomes null.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Written {
    Bools(Vec<bool>),
    Bytes(Vec<u8>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Texts(Vec<String>),
}

pub(super) fn written(tensor: &Tensor) -> Written {
    let values = &tensor.values;
    match tensor.datatype {
        Datatype::Bool => Written::Bools(values.iter().map(|value| *value != 0).collect()),
        Datatype::U8 => Written::Bytes(values.0.clone()),
        Datatype::I32 => Written::I32(numbers(values, i32::from_le_bytes)),
        Datatype::I64 => Written::I64(numbers(values, i64::from_le_bytes)),
        Datatype::F32 => Written::F32(numbers(values, f32::from_le_bytes)),
        Datatype::F64 => Written::F64(numbers(values, f64::from_le_bytes)),
        Datatype::Bytes => {
            let elements = elements(values).unwrap_or_default();
            Written::Texts(elements.into_iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect())
        }
    }
}

fn numbers<T, const BYTES: usize>(values: &[u8], number: fn([u8; BYTES]) -> T) -> Vec<T> {
    values.as_chunks().0.iter().map(|bytes| number(*bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(json: &str) -> Result<Flat, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn nested_values_are_read_in_order() {
        assert_eq!(flat("[[1, 2], [3, 4]]"), Ok(Flat::Integers(vec![1, 2, 3, 4])));
        assert_eq!(flat("[1, 2.5, 3]"), Ok(Flat::Floats(vec![1.0, 2.5, 3.0])));
        assert_eq!(flat("[[true], [false]]"), Ok(Flat::Bools(vec![true, false])));
        assert_eq!(flat("[\"a\", [\"b\"]]"), Ok(Flat::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(flat("[]"), Ok(Flat::Integers(Vec::new())));
        for mixed in ["[1, \"a\"]", "[\"a\", 1]", "[true, 1]", "[1, true]", "[null]", "[{}]"] {
            assert!(flat(mixed).is_err(), "{mixed}");
        }
        assert!(flat(&"[".repeat(100_000)).is_err());
    }

    #[test]
    fn values_fit_their_data_type_or_are_refused() {
        let values = |json: &str, datatype| flat(json).unwrap().into_values("x", datatype);
        assert_eq!(values("[0, 255]", Datatype::U8), Ok(vec![0, 255]));
        assert_eq!(values("[-1]", Datatype::I32), Ok(vec![255; 4]));
        assert_eq!(values("[1]", Datatype::F32), Ok(1f32.to_le_bytes().to_vec()));
        assert_eq!(values("[\"ab\"]", Datatype::Bytes), Ok(vec![2, 0, 0, 0, b'a', b'b']));
        let misfits = [("[256]", Datatype::U8), ("[-1]", Datatype::U8), ("[3000000000]", Datatype::I32)];
        for (json, datatype) in misfits {
            assert!(values(json, datatype).is_err(), "{json}");
        }
        for (json, datatype) in [("[1e300]", Datatype::F32), ("[1.5]", Datatype::I64), ("[1]", Datatype::Bytes)] {
            assert!(values(json, datatype).is_err(), "{json}");
        }
    }

    #[test]
    fn a_shape_that_is_not_that_of_the_values_is_refused() {
        let tensor = |shape: &[u64], bytes: usize| checked("x".into(), Datatype::F32, shape.to_vec(), vec![0; bytes]);
        assert!(tensor(&[2, 3], 24).is_ok());
        assert!(tensor(&[], 4).is_ok());
        for (shape, bytes) in [(&[2, 3][..], 20), (&[2], 7), (&[u64::MAX, u64::MAX], 4), (&[1 << 40], 4), (&[1; 9], 4)]
        {
            assert!(tensor(shape, bytes).is_err(), "{shape:?}");
        }
        let bytes = |values: &[u8]| checked("x".into(), Datatype::Bytes, vec![1], values.to_vec());
        assert!(bytes(&[1, 0, 0, 0, 7]).is_ok());
        for cut in [&[1, 0, 0, 0][..], &[1, 0, 0], &[255; 5], &[0, 0, 0, 0, 0]] {
            assert!(bytes(cut).is_err(), "{cut:?}");
        }
    }
}
