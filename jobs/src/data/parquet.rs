//! Parquet files. Only the columns that are asked for are read.

mod footer;

use std::io::{self, BufReader, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use ::parquet::errors::{ParquetError, Result as ParquetResult};
use ::parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use ::parquet::record::Field as Value;
use ::parquet::schema::types::{Type, TypePtr};
use bytes::Bytes;

use super::files::{ReadAt, Reader};
use super::{Each, Field, few, numbered, short};
use crate::JobError;

/// The largest run of bytes that one page may be: what a damaged length could ask for.
const PAGE_BYTES_MAX: usize = 1 << 30;

/// A file that remembers why it could not be read: the crate makes texts of some errors.
struct Chunks {
    file: Arc<dyn ReadAt>,
    failed: Arc<OnceLock<io::Error>>,
}

impl ReadAt for Chunks {
    fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_at(at, into).map_err(|error| {
            let told = io::Error::new(error.kind(), error.to_string());
            let _first = self.failed.set(error);
            told
        })
    }
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.file.bytes()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Reader>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        let mut reader = Reader::new(Arc::new(Self { file: self.file.clone(), failed: self.failed.clone() }));
        reader.seek(SeekFrom::Start(start))?;
        Ok(BufReader::with_capacity(1 << 16, reader))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let has = self.bytes();
        if length > PAGE_BYTES_MAX || start.checked_add(length as u64).is_none_or(|end| end > has) {
            return Err(ParquetError::EOF(format!("{length} bytes from byte {start} on: the file has {has}")));
        }
        let mut bytes = vec![0; length];
        self.read_at(start, &mut bytes)?;
        Ok(bytes.into())
    }
}

pub(super) fn read(path: &Path, file: Arc<dyn ReadAt>, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
    let failed: Arc<OnceLock<io::Error>> = Arc::default();
    let chunks = Chunks { file, failed: failed.clone() };
    let because = |problem: &str| match failed.get() {
        Some(source) => {
            let source = io::Error::new(source.kind(), source.to_string());
            JobError::File { path: path.into(), source }
        }
        None => {
            let problem = format!("not a Parquet file that can be read: {}", short(problem));
            JobError::Data { path: path.into(), problem }
        }
    };
    if guarded(|| footer::levels(&chunks)).map_err(|problem| because(&problem))? > footer::LEVELS_MAX {
        let problem = format!(
            "its schema is nested deeper than {} levels, which is not read: write the columns that are needed to a file of their own",
            footer::LEVELS_MAX
        );
        return Err(JobError::Data { path: path.into(), problem });
    }
    let reader = guarded(|| SerializedFileReader::new(chunks)).map_err(|problem| because(&problem))?;
    let schema = reader.metadata().file_metadata().schema();
    let wanted = wanted(path, schema, columns)?;
    // The projection has each column once, in the order of the file.
    let places: Vec<usize> = columns
        .iter()
        .map(|column| wanted.get_fields().iter().position(|field| field.name() == *column).expect("it was found"))
        .collect();
    let mut rows = guarded(|| reader.get_row_iter(Some(wanted))).map_err(|problem| because(&problem))?;
    for number in 1.. {
        let Some(row) = guarded(|| rows.next().transpose()).map_err(|problem| because(&problem))? else { break };
        let values: Vec<&Value> = row.get_column_iter().map(|(_, value)| value).collect();
        let held: Vec<Held> = places
            .iter()
            .zip(columns)
            .map(|(place, column)| {
                held(values[*place]).map_err(|problem| numbered(path, number, format!("{column}: {problem}")))
            })
            .collect::<Result<_, _>>()?;
        let fields: Vec<Field<'_>> = held.iter().map(Held::field).collect();
        each(&fields).map_err(|problem| numbered(path, number, problem))?;
    }
    Ok(())
}

/// The crate has asserts on what it reads, which a damaged file may hit.
fn guarded<T>(work: impl FnOnce() -> ParquetResult<T>) -> Result<T, String> {
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    done.map_err(|_| "it is damaged".to_owned())?.map_err(|error| error.to_string())
}

/// The schema with the asked columns alone.
fn wanted(path: &Path, schema: &Type, columns: &[&str]) -> Result<Type, JobError> {
    let data = |problem| JobError::Data { path: path.into(), problem };
    let mut fields: Vec<TypePtr> = Vec::new();
    for field in schema.get_fields().iter().filter(|field| columns.contains(&field.name())) {
        if fields.iter().any(|known| known.name() == field.name()) {
            return Err(data(format!("two columns \"{}\": which one is meant?", field.name())));
        }
        fields.push(field.clone());
    }
    if let Some(column) = columns.iter().find(|column| !fields.iter().any(|field| field.name() == **column)) {
        let has = few(schema.get_fields().iter().map(|field| field.name()));
        return Err(data(format!("no column \"{column}\" (it has {has})")));
    }
    let wanted = Type::group_type_builder(schema.name()).with_fields(fields).build();
    wanted.map_err(|error| data(error.to_string()))
}

/// A value, in one of the forms that trainers read.
enum Held {
    Text(String),
    Json(serde_json::Value),
}

impl Held {
    fn field(&self) -> Field<'_> {
        match self {
            Self::Text(text) => Field::Text(text),
            Self::Json(value) => Field::Json(value),
        }
    }
}

fn held(value: &Value) -> Result<Held, String> {
    Ok(match value {
        Value::Str(text) => Held::Text(text.clone()),
        Value::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Held::Text(text.to_owned()),
            Err(_) => Held::Json(bytes.data().iter().copied().map(serde_json::Value::from).collect()),
        },
        other => Held::Json(json(other)?),
    })
}

fn json(value: &Value) -> Result<serde_json::Value, String> {
    Ok(match value {
        Value::Null => serde_json::Value::Null,
        Value::Bool(value) => (*value).into(),
        Value::Byte(value) => (*value).into(),
        Value::Short(value) => (*value).into(),
        Value::Int(value) => (*value).into(),
        Value::Long(value) => (*value).into(),
        Value::UByte(value) => (*value).into(),
        Value::UShort(value) => (*value).into(),
        Value::UInt(value) => (*value).into(),
        Value::ULong(value) => (*value).into(),
        Value::Float(value) => f64::from(*value).into(),
        Value::Double(value) => (*value).into(),
        Value::Str(text) => text.as_str().into(),
        Value::ListInternal(list) => list.elements().iter().map(json).collect::<Result<_, _>>()?,
        other => return Err(format!("no trainer reads a value of this type: {}", short(&other.to_string()))),
    })
}

#[cfg(test)]
mod tests {
    use ::parquet::basic::{Compression, ZstdLevel};
    use ::parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    use super::super::files::open;
    use super::*;

    fn write(path: &Path, rows: usize, compression: Compression) {
        let schema =
            "message rows { required binary other (UTF8); required binary name (UTF8); required int32 label; }";
        let schema = Arc::new(parse_message_type(schema).expect("a schema"));
        let properties =
            WriterProperties::builder().set_compression(compression).set_max_row_group_row_count(Some(100)).build();
        let file = std::fs::File::create(path).expect("a file");
        let mut writer = SerializedFileWriter::new(file, schema, properties.into()).expect("a writer");
        for first in (0..rows).step_by(100) {
            let rows = first..rows.min(first + 100);
            let mut group = writer.next_row_group().expect("a group");
            for column in ["other", "name"] {
                let mut columns = group.next_column().expect("a column").expect("there is one");
                let texts: Vec<ByteArray> =
                    rows.clone().map(|row| ByteArray::from(format!("{column}{row}").as_str())).collect();
                columns.typed::<ByteArrayType>().write_batch(&texts, None, None).expect("written");
                columns.close().expect("closed");
            }
            let mut columns = group.next_column().expect("a column").expect("there is one");
            let labels: Vec<i32> = rows.map(|row| row as i32 % 10).collect();
            columns.typed::<Int32Type>().write_batch(&labels, None, None).expect("written");
            columns.close().expect("closed");
            group.close().expect("closed");
        }
        writer.close().expect("closed");
    }

    fn rows(path: &Path, columns: &[&str]) -> Result<Vec<(u64, String)>, String> {
        let mut out = Vec::new();
        let read = open(path).and_then(|file| {
            read(path, file, columns, &mut |fields| {
                out.push((fields[0].integer(9)?, fields[1].text()?.into_owned()));
                Ok(())
            })
        });
        read.map(|()| out).map_err(|error| error.to_string().replace(path.to_str().expect("UTF-8"), "FILE"))
    }

    #[test]
    fn rows_of_all_groups_come_in_order_whatever_packs_them() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.parquet");
        let level = ZstdLevel::try_new(3).expect("a level");
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(level)] {
            write(&path, 250, compression);
            let expected: Vec<(u64, String)> = (0..250).map(|row| (row % 10, format!("name{row}"))).collect();
            assert_eq!(rows(&path, &["label", "name"]), Ok(expected));
        }
        assert_eq!(rows(&path, &["label", "label"]).expect("rows")[12].1, "2");
        let missing = rows(&path, &["labels", "name"]).expect_err("no such column");
        assert_eq!(missing, "data FILE: no column \"labels\" (it has other, name, label)");
        let wrong = rows(&path, &["name", "label"]).expect_err("no number");
        assert_eq!(wrong, "data FILE: row 1: expected a whole number from 0 to 9, found \"name0\"");
    }

    #[test]
    fn damage_is_an_error_wherever_it_is() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.parquet");
        write(&path, 250, Compression::SNAPPY);
        let good = std::fs::read(&path).expect("a file");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= if at % 2 == 0 { 0x01 } else { 0xff };
            std::fs::write(&path, &bad).expect("written");
            // A byte of a text may be another one; a row is never made up, and nothing ends the process.
            if let Ok(rows) = rows(&path, &["label", "name"]) {
                assert!(rows.len() <= 250 && rows.iter().all(|(label, _)| *label <= 9), "byte {at}");
            }
        }
        for length in [0, 4, 11, good.len() / 2, good.len() - 1] {
            std::fs::write(&path, &good[..length]).expect("written");
            assert!(rows(&path, &["label", "name"]).is_err(), "{length}");
        }
    }

    /// A file of one row whose schema has so many levels: the root, a column `name`, and beside it groups one in the other.
    fn write_nested(path: &Path, levels: usize) {
        use ::parquet::basic::{Repetition, Type as Physical};
        let path = path.to_owned();
        // The crate writes it as deep as it reads it, and this is no test of that.
        let written = std::thread::Builder::new().stack_size(1 << 28).spawn(move || {
            let leaf = |name| Type::primitive_type_builder(name, Physical::INT32).with_repetition(Repetition::REQUIRED);
            let name = Arc::new(leaf("name").build().expect("a column"));
            let mut nested = Arc::new(leaf("leaf").build().expect("a column"));
            for _ in 2..levels {
                let group = Type::group_type_builder("group").with_repetition(Repetition::REQUIRED);
                nested = Arc::new(group.with_fields(vec![nested]).build().expect("a group"));
            }
            let schema = Type::group_type_builder("rows").with_fields(vec![name, nested]).build().expect("a schema");
            let file = std::fs::File::create(path).expect("a file");
            let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::default()).expect("a writer");
            let mut group = writer.next_row_group().expect("a group");
            while let Some(mut column) = group.next_column().expect("a column") {
                column.typed::<Int32Type>().write_batch(&[1], None, None).expect("written");
                column.close().expect("closed");
            }
            group.close().expect("closed");
            writer.close().expect("closed");
        });
        written.expect("a thread").join().expect("written");
    }

    #[test]
    fn a_schema_that_is_too_deep_is_refused_before_anything_calls_itself_for_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.parquet");
        let read = || rows(&path, &["name", "name"]);
        for levels in [2, 3, footer::LEVELS_MAX] {
            write_nested(&path, levels);
            assert_eq!(read(), Ok(vec![(1, "1".to_owned())]), "{levels}");
        }
        let deep = rows(&path, &["name", "group"]).expect_err("no text");
        assert!(deep.starts_with("data FILE: row 1: group: no trainer reads a value of this type"), "{deep}");
        let said = "data FILE: its schema is nested deeper than 64 levels, which is not read: write the columns that are needed to a file of their own";
        for levels in [1_000, 10_000, footer::LEVELS_MAX + 1] {
            write_nested(&path, levels);
            assert_eq!(read(), Err(said.to_owned()), "{levels}");
        }
    }

    /// A store that goes away after so many reads.
    struct Leaves(Arc<dyn ReadAt>, std::sync::atomic::AtomicUsize);

    impl ReadAt for Leaves {
        fn bytes(&self) -> u64 {
            self.0.bytes()
        }

        fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
            let left = self.1.load(std::sync::atomic::Ordering::Relaxed);
            self.1.store(left.saturating_sub(1), std::sync::atomic::Ordering::Relaxed);
            if left == 0 { Err(io::Error::other("the store does not answer")) } else { self.0.read_at(at, into) }
        }
    }

    #[test]
    fn a_store_that_goes_away_is_no_damage_and_may_pass() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.parquet");
        write(&path, 250, Compression::SNAPPY);
        let remote = Path::new("s3://bucket/a.parquet");
        for reads in 0.. {
            let file = Arc::new(Leaves(open(&path).expect("a file"), reads.into()));
            let Err(error) = read(remote, file, &["label"], &mut |_| Ok(())) else {
                assert!(reads > 3, "it is read in several parts");
                break;
            };
            assert!(error.is_passing() && error.to_string().contains("the store does not answer"), "{reads}: {error}");
        }
    }
}
